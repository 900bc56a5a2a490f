"""Cores shared out among processes that compute at once: each sees the others while they do, and nobody who has gone."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm.ops.cpu.native import library, seats
from llm.ops.cpu.native.seats import Seats, open_seats
from tandem.models import cache_directory

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def native() -> Any:
    return library.load(cache_directory())


def _share_once_gone_on(mine: Seats) -> int:
    """When those who left a moment ago are not expected back any more."""
    while (share := mine.share()) < mine.cores:
        time.sleep(0.001)
    return share


@pytest.mark.parametrize(("cores", "shares"), [(1, (1, 1, 1)), (2, (2, 1, 1)), (3, (3, 1, 1)), (8, (8, 4, 2)), (32, (32, 16, 10))])
def test_cores_are_shared_among_those_who_compute(native: Any, tmp_path: Path, cores: int, shares: tuple[int, int, int]) -> None:
    alone, of_two, of_three = shares
    mine, second, third = (Seats(native, tmp_path / "seats", cores) for _ in range(3))
    with mine.taken():
        assert mine.share() == alone
        with second.taken():
            assert (mine.share(), second.share()) == (of_two, of_two)
            with third.taken():
                assert (mine.share(), second.share(), third.share()) == (of_three,) * 3
        assert _share_once_gone_on(mine) == alone


def test_who_is_between_two_steps_keeps_the_share(native: Any, tmp_path: Path) -> None:
    mine, theirs = (Seats(native, tmp_path / "seats", 2) for _ in range(2))
    with mine.taken():
        shares = []
        while 1 not in shares:  # once more if this process was stopped for as long as others are expected back
            with theirs.taken():
                pass
            shares.append(mine.share())
        assert _share_once_gone_on(mine) == 2


def test_a_worker_alone_does_not_wait_for_itself_to_come_back(native: Any, tmp_path: Path) -> None:
    mine, theirs = (Seats(native, tmp_path / "seats", 2) for _ in range(2))
    with theirs.taken(), mine.taken():
        pass
    _share_once_gone_on(mine)
    for _ in range(10):
        with mine.taken():
            assert mine.share() == 2


def test_a_step_that_fails_leaves_its_seat(native: Any, tmp_path: Path) -> None:
    mine, theirs = (Seats(native, tmp_path / "seats", 2) for _ in range(2))
    with pytest.raises(MemoryError), theirs.taken():
        raise MemoryError
    with mine.taken():
        assert _share_once_gone_on(mine) == 2


def test_more_workers_than_seats_compute_all_the_same(native: Any, tmp_path: Path) -> None:
    """Some are not seen then; nobody waits or fails."""
    workers = [Seats(native, tmp_path / "seats", 64) for _ in range(20)]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.taken())
        assert {worker.share() for worker in workers} == {64 // 16, 64 // 17}


def _compute_and_die(path: Path) -> None:
    with Seats(library.load(cache_directory()), path, 2).taken():
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_in_its_step_takes_no_share(native: Any, tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_compute_and_die, args=(tmp_path / "seats",))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    mine = Seats(native, tmp_path / "seats", 2)
    for _ in range(2):
        with mine.taken():
            assert mine.share() == 2


@pytest.mark.parametrize("size", [0, 8, 4096])
def test_memory_of_another_size_is_left_alone(native: Any, tmp_path: Path, size: int) -> None:
    """To touch it beyond its end would end the process."""
    Seats(native, tmp_path / "seats", 2)
    (made,) = tmp_path.iterdir()
    made.write_bytes(bytes(size))
    mine = Seats(native, tmp_path / "seats", 2)
    assert not mine.shared
    with mine.taken():
        assert mine.share() == 2


def test_workers_of_another_version_are_beside_not_in_the_way(native: Any, tmp_path: Path) -> None:
    """Their memory has another size, and so another name."""
    (tmp_path / "seats").write_bytes(bytes(8))
    (tmp_path / "seats-8").write_bytes(bytes(8))
    mine, second = (Seats(native, tmp_path / "seats", 2) for _ in range(2))
    assert mine.shared
    with mine.taken(), second.taken():
        assert mine.share() == 1


def test_without_shared_memory_steps_have_all_cores(native: Any, tmp_path: Path) -> None:
    mine = Seats(native, tmp_path / "missing" / "seats", 2)
    with mine.taken():
        assert mine.share() == 2


@pytest.mark.parametrize(
    ("sets", "share"),
    [
        (((0, 1), (0, 1)), 1),  # a laptop
        ((range(32), range(32)), 1),  # one processor
        ((range(16), range(16, 32)), 2),  # a node each, by numactl
        (((0,), (1,)), 2),  # pinned
    ],
)
def test_cores_are_shared_among_workers_on_the_same_ones(
    native: Any, tmp_path: Path, sets: Sequence[Iterable[int]], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "_SHARED", tmp_path)
    both = []
    for cores in sets:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(cores), raising=False)
        both.append(open_seats(native, 2))
    with both[0].taken(), both[1].taken():
        assert both[0].share() == share

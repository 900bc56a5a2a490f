"""Turns among processes that share cores: taken in order, given up between layers, never waited for without end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llm.ops.cpu.native import library, turns
from llm.ops.cpu.native.slices import LEAST_S, SHARE, Slices
from llm.ops.cpu.native.turns import Turns, open_turns
from tandem.models import cache_directory
from tests.fakes.clock import Clock
from tests.faults.clock import WallClocks, compiler

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def native() -> Any:
    return library.load(cache_directory())


def _turns(native: Any, path: Path, clock: Callable[[], float] = time.monotonic) -> Turns:
    return Turns(native, path, Slices(0.2), clock)


def test_a_turn_keeps_others_out_until_it_ends(native: Any, tmp_path: Path) -> None:
    mine, theirs = (_turns(native, tmp_path / "turns") for _ in range(2))
    entered, ended = threading.Event(), []

    def take() -> None:
        with theirs.turn():
            ended.append("theirs")

    other = threading.Thread(target=take)
    with mine.turn():
        other.start()
        assert not entered.wait(0.02)
        ended.append("mine")
    other.join(10)
    assert ended == ["mine", "theirs"]


def test_a_long_step_lets_others_in_between(native: Any, tmp_path: Path) -> None:
    clock, order = Clock(), []
    mine, theirs = _turns(native, tmp_path / "turns", clock), _turns(native, tmp_path / "turns")

    def take() -> None:
        with theirs.turn():
            order.append("theirs")

    other = threading.Thread(target=take)
    with mine.turn():
        other.start()
        while not native.tandem_turn_is_wanted(mine._turns):
            pass
        mine.pass_on()
        order.append("too early")
        clock.now += 2 * LEAST_S
        mine.pass_on()
        order.append("mine again")
    other.join(10)
    assert order == ["too early", "theirs", "mine again"]


def test_slices_grow_with_what_others_take(native: Any, tmp_path: Path) -> None:
    clock, order = Clock(), []
    mine, theirs = _turns(native, tmp_path / "turns", clock), _turns(native, tmp_path / "turns")

    def take() -> None:
        with theirs.turn():
            clock.now += LEAST_S
            order.append("theirs")

    def pass_on_after(mine_s: float) -> None:
        clock.now += mine_s
        mine.pass_on()
        order.append("mine")

    with mine.turn():
        for waits_s in ((1.2 * LEAST_S,), (1.2 * LEAST_S, SHARE * LEAST_S)):
            other = threading.Thread(target=take)
            other.start()
            while not native.tandem_turn_is_wanted(mine._turns):
                pass
            for mine_s in waits_s:
                pass_on_after(mine_s)
            other.join(10)
    assert order == ["theirs", "mine", "mine", "theirs", "mine"]


def test_without_a_target_there_are_no_turns(native: Any) -> None:
    told = open_turns(native, 200)
    assert told is not None and told.shared
    assert open_turns(native, 0) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "together"),
    [
        ((0, 1), (0, 1), True),  # a laptop
        (range(32), range(32), True),  # one processor
        (range(16), range(16, 32), False),  # a node each, by numactl
        ((0,), (1,), False),  # pinned
    ],
)
def test_turns_are_taken_among_workers_on_the_same_cores(
    mine: Iterable[int], theirs: Iterable[int], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for cores in (mine, theirs):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(cores), raising=False)
        paths.append(turns.shared_path())
    assert (paths[0] == paths[1]) == together


def test_who_waits_too_long_goes_ahead_and_distrusts_for_a_while(native: Any, tmp_path: Path) -> None:
    clock = Clock()
    stopped, mine = _turns(native, tmp_path / "turns"), _turns(native, tmp_path / "turns", clock)
    taken, over = threading.Event(), threading.Event()

    def stop_in_turn() -> None:
        with stopped.turn():
            taken.set()
            over.wait(60)

    other = threading.Thread(target=stop_in_turn)
    other.start()
    assert taken.wait(60)
    passed = []
    for wait_s in (0.0, 1.0, 3.0):
        clock.now += wait_s
        with mine.turn():
            passed.append(mine._mine)
    over.set()
    other.join(60)
    clock.now += 10.0
    with mine.turn():
        passed.append(mine._mine)
    assert passed == [False, False, False, True]


WAIT_FOR_A_TURN = """
import sys, threading, time
from pathlib import Path
from llm.ops.cpu.native import library, turns
from llm.ops.cpu.native.slices import Slices
from llm.ops.cpu.native.turns import Turns
from tandem.models import cache_directory
theirs, mine = (Turns(library.load(cache_directory()), Path(sys.argv[1]), Slices(0.2)) for _ in range(2))
sys.stdin.readline()
with theirs.turn():
    began = time.monotonic()
    waiting = threading.Thread(target=mine._take)
    waiting.start()
    waiting.join()
    print(mine._mine, time.monotonic() - began)
"""


@pytest.mark.skipif(compiler() is None, reason="the stepped clock is built here, and there is no C compiler")
def test_a_wait_is_as_long_when_the_wall_clock_jumps(native: Any, tmp_path: Path) -> None:
    clocks = WallClocks(tmp_path)
    command = [sys.executable, "-c", WAIT_FOR_A_TURN, str(tmp_path / "turns")]
    environment = {**os.environ, **clocks.environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as waiting:
        clocks.step(waiting.pid, -3600)
        mine, waited_s = waiting.communicate("go\n", timeout=60)[0].split()
    assert mine == "False"
    assert float(waited_s) >= turns._LIMIT_MS / 1000 - 0.001  # whole milliseconds


def _take_and_die(path: Path) -> None:
    turns = _turns(library.load(cache_directory()), path)
    turns._take()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_in_its_turn_holds_nobody_up(native: Any, tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(tmp_path / "turns",))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    mine = _turns(native, tmp_path / "turns")
    for _ in range(2):
        with mine.turn():
            assert mine._mine


@pytest.mark.parametrize("size", [0, 8, 4096])
def test_memory_of_another_version_is_left_alone(native: Any, tmp_path: Path, size: int) -> None:
    """To touch it beyond its end would end the process."""
    (tmp_path / "turns").write_bytes(bytes(size))
    mine = _turns(native, tmp_path / "turns")
    assert not mine.shared
    with mine.turn():
        assert not mine._mine


def test_without_shared_memory_steps_run_as_they_come(native: Any, tmp_path: Path) -> None:
    mine = _turns(native, tmp_path / "missing" / "turns")
    with mine.turn():
        mine.pass_on()
        assert not mine._mine

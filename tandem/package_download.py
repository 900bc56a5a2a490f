"""Downloads one Python package's wheel with the pip of this environment, as its owner configured it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# pip has time-outs of its own; this one ends a pip that neither progresses nor gives up.
_STALL_S = 300.0
_POLL_S = 0.2


class FetchError(Exception):
    """One attempt at a download failed. `permanent`: another attempt would fail in the same way."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def download_package(requirement: str, directory: Path, on_bytes: Callable[[int], None]) -> Path:
    """Fetch the wheel of `requirement` ("name==version") into `directory`; `on_bytes` hears the bytes so far. Raises FetchError."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"pip is not installed in this environment; run `{sys.executable} -m ensurepip`", permanent=True)
    log = directory / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            _command(requirement, directory), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=_environment(directory)
        )
        try:
            _watch(process, directory, on_bytes)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise FetchError(_last_error(log))
    return _only_wheel(directory)


def _command(requirement: str, directory: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--progress-bar",
        "off",
        "--dest",
        str(directory),
        requirement,
    ]


def _environment(directory: Path) -> dict[str, str]:
    """pip downloads to its temporary directory: keep that where its size can be seen, and where it is removed with the rest."""
    return {**os.environ, "TMPDIR": str(directory), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def _watch(process: subprocess.Popen[bytes], directory: Path, on_bytes: Callable[[int], None]) -> None:
    last_bytes, last_change = -1, time.monotonic()
    while process.poll() is None:
        num_bytes = _largest_file_bytes(directory)
        if num_bytes != last_bytes:
            last_bytes, last_change = num_bytes, time.monotonic()
        elif time.monotonic() - last_change > _STALL_S:
            raise FetchError(f"no progress for {_STALL_S:.0f} s")
        on_bytes(num_bytes)
        _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _largest_file_bytes(directory: Path) -> int:
    return max((_size(path) for path in directory.rglob("*")), default=0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_error(log: Path) -> str:
    """What pip said: its ERROR lines if there are any, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return "; ".join(errors[-2:] or lines[-1:]) or "pip failed without a word"


def _only_wheel(directory: Path) -> Path:
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels where one was expected")
    return wheels[0]

"""One child process: its output kept and passed on line by line, its end certain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_KEPT_LINES = 30
_READ_BYTES = 1 << 16
_MAX_LOG_BYTES = 16 << 20
# A grandchild may hold the output open after the child is gone; nobody waits longer for it than this.
_OUTPUT_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChildSpec:
    """A process to run. Children of a smaller `stop_order` are stopped first."""

    name: str
    command: tuple[str, ...]
    stop_order: int = 0


class LogFile:
    """A child's output on disk; the older half is dropped when it grows beyond a bound.

    Lines that the disk has no room for are dropped: whoever stopped reading because of them would block the child.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_LOG_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._file.tell() > self._max_bytes // 2:
                self._rotate()
            self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return self.path.open("wb", buffering=0)

    def _rotate(self) -> None:
        os.replace(self.path, self.path.with_suffix(".old.log"))
        full, self._file = self._file, self._open()
        full.close()


class Child:
    """Runs a spec's command, again and again if asked, until stopped; all calls on one event loop.

    Its stdin is a pipe that only this process holds: a child that watches it notices when this process dies, even by SIGKILL.
    It leads a process group of its own, so that Ctrl-C in a terminal reaches this process alone and the order of stopping is ours.
    """

    def __init__(self, spec: ChildSpec, log: LogFile, on_line: Callable[[str, str], None]) -> None:
        self.spec = spec
        self.log = log
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        # Held while spawning, so that a stop never misses a process that is just being made.
        self._spawning = asyncio.Lock()
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The running process's id; None when none runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def run_once(self) -> int | None:
        """Start the process and return its exit status (negative: the signal that ended it); None if the child has been stopped."""
        async with self._spawning:
            if self._stopped:
                return None
            process = self._process = await self._spawn()
        output = asyncio.create_task(self._read_output(process))
        try:
            status = await process.wait()
            await asyncio.wait([output], timeout=_OUTPUT_S)
        finally:
            output.cancel()
        return None if self._stopped else status

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, and end it after `grace_s`. It will not be started again."""
        self._stopped = True
        async with self._spawning:
            process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            _log.warning("%s did not stop within %.0f s and is killed", self.spec.name, grace_s)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End the process now."""
        self._stopped = True
        if self._process and self._process.returncode is None:
            self._process.kill()

    async def _spawn(self) -> asyncio.subprocess.Process:
        pipe, merged = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        return await asyncio.create_subprocess_exec(*self.spec.command, stdin=pipe, stdout=pipe, stderr=merged, process_group=0)

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "spawned with a pipe"
        rest = b""
        while chunk := await process.stdout.read(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take_line(line)
            rest = rest[-_READ_BYTES:]
        if rest:
            self._take_line(rest)

    def _take_line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        self.last_lines.append(line)
        self.log.write(line)
        self._on_line(self.spec.name, line)

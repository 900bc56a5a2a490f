"""Wall clocks that jump, each process's on its own: what an operator, or a time server after a long pause, does to a host.

A small library, built here and preloaded, stands between the processes of a suite and the C library: Python, gRPC and everything
else in the process see the same wrong time. Monotonic clocks stay as they are, as on a real host.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("clock_step.c")
SLOTS = 64
_STEP = struct.Struct("=qq")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class WallClocks:
    """The clocks of up to 64 processes. `environment` is for the process that all others are forked from."""

    def __init__(self, directory: Path) -> None:
        library, table = directory / "clock_step.so", directory / "clock_steps"
        program = compiler()
        assert program is not None, "no C compiler"
        subprocess.run([program, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
        table.write_bytes(bytes(SLOTS * _STEP.size))
        with table.open("r+b") as file:
            self._table = mmap.mmap(file.fileno(), 0)
        self._slots: dict[int, int] = {}
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "FAULTS_CLOCK": str(table)}

    def step(self, pid: int, seconds: int) -> None:
        """From now on the process's wall clock is so many seconds wrong."""
        slot = self._slots.setdefault(pid, len(self._slots))
        _STEP.pack_into(self._table, slot * _STEP.size, pid, seconds)

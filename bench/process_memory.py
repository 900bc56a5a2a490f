"""What a server's processes hold in memory, its children and theirs included."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes. In `resident` a page that several processes share counts once for each, in `proportional` once in all."""

    resident: int
    proportional: int

    def __str__(self) -> str:
        return f"{self.resident / 1e6:,.0f} ({self.proportional / 1e6:,.0f})"


def memory_of(process_id: int) -> Memory:
    """Now. Processes that end meanwhile count nothing."""
    root = psutil.Process(process_id)
    found = []
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(process.memory_full_info())
    return Memory(sum(each.rss for each in found), sum(each.pss for each in found))

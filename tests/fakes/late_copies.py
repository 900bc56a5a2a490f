"""Copies that a device has begun and makes late, for machines without one."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm.kv.block_arrays import BlockIds, Sums
from tests.fakes.interpreter import interpret_without_gpu

interpret_without_gpu()
device_blocks = pytest.importorskip("kvtransfer.device_blocks")


class LateCopy:
    """Stands for llm.kv.device_lane.Fetch, and for its event. Made when it has been looked at so many times, or by `make`: what a
    test calls, or a device that has come to work that was put behind it."""

    cuda_event = 0

    def __init__(self, copy: Callable[[], Sums], looks: float) -> None:
        self._copy, self._looks = copy, looks
        self._lock = threading.Lock()
        self._made = threading.Event()
        self._found: Sums | None = None
        self._error: Exception | None = None
        self.waiters = list[str]()
        """Threads that waited."""

    @property
    def event(self) -> "LateCopy":
        return self

    def make(self) -> None:
        with self._lock:
            if not self._made.is_set():
                self._found = self._copy()
                self._made.set()

    def fail(self, error: Exception) -> None:
        """From now on whoever looks at it is told."""
        self._error = error

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        self._looks -= 1
        if self._looks < 0:
            self.make()
        return self._made.is_set()

    def wait(self) -> None:
        self.waiters.append(threading.current_thread().name)
        assert self._made.wait(30)

    def sums(self) -> Sums:
        assert self._found is not None, "asked before it was done"
        found, self._found = self._found, None
        return found


def make_late(monkeypatch: pytest.MonkeyPatch, looks: float = 3) -> list[LateCopy]:
    """Fetches that DeviceBlocks begin are late; those that were begun."""
    begun = list[LateCopy]()

    def begin_fetch(blocks: Any, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> LateCopy:
        begun.append(LateCopy(lambda: blocks.fetch(source, source_ids, block_ids), looks))
        return begun[-1]

    monkeypatch.setattr(device_blocks.DeviceBlocks, "begin_fetch", begin_fetch)
    return begun

"""How many threads compute a step. On a crowded machine one alone is faster than two that wait for each other.

A step of few rows is hundreds of operations of tens of microseconds, and each ends by waiting for every thread. If another
process holds one thread's core, every operation waits for the scheduler. Such steps run in one thread until the crowd is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

_FEW_ROWS = 64
_CROWDED_RATIO = 1.5
"""Wall time over the engine thread's own time: it sleeps only while it waits for another thread, or for its own core."""
_PATIENCE_STEPS = 2
_ALONE_STEPS = 32
"""Then all threads are tried again."""


class Threads:
    """The number of threads for the step at hand. Results do not depend on it: sums are never split between threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = most
        self._crowded_steps = 0
        self._steps_left_alone = 0
        torch.set_num_threads(most)
        self._limit = min(most, numba.config.NUMBA_NUM_THREADS)

    @contextmanager
    def step(self, num_rows: int) -> Iterator[None]:
        """Wraps one forward pass; call it on the thread that computes."""
        is_short = num_rows <= _FEW_ROWS
        self.count = 1 if is_short and self._steps_left_alone else self.most
        numba.set_num_threads(min(self.count, self._limit))
        wall, own = time.perf_counter(), time.thread_time()
        yield
        if is_short:
            self.observe(time.perf_counter() - wall, time.thread_time() - own)

    def observe(self, wall_s: float, own_s: float) -> None:
        """Learns from a step of few rows."""
        if self._steps_left_alone:
            self._steps_left_alone -= 1
            return
        self._crowded_steps = self._crowded_steps + 1 if wall_s > _CROWDED_RATIO * own_s else 0
        if self._crowded_steps >= _PATIENCE_STEPS and self.most > 1:
            self._crowded_steps, self._steps_left_alone = 0, _ALONE_STEPS

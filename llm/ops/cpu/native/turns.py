"""Turns at computing, for workers that share cores: two steps at once would wait for the scheduler at each of their barriers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.cores import usable_cores
from llm.ops.cpu.native.slices import Slices

_SHARED = Path("/dev/shm")
_LIMIT_MS = 500
"""Who waited this long computes anyway: the other may be stopped, or computing something long."""
_DISTRUST_S = 5.0
"""After that, nobody is waited for in this time."""


class Turns:
    """One engine thread's turns, among all processes of this user on the same cores."""

    def __init__(self, library: ctypes.CDLL, path: Path, slices: Slices, clock: Callable[[], float] = time.monotonic) -> None:
        self._library, self._slices, self._clock = library, slices, clock
        self._turns = library.tandem_open_turns(os.fsencode(path))
        self._mine = False
        self._taken_at = self._piece_at = self._distrust_until = 0.0
        if self._turns:
            weakref.finalize(self, library.tandem_close_turns, self._turns).atexit = False  # a thread may be in its turn then

    @property
    def shared(self) -> bool:
        """Whether other processes can be waited for at all."""
        return bool(self._turns)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wraps a step; waits for those of others that run or came first."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def pass_on(self) -> None:
        """Within a turn, between its pieces: lets others have theirs if they wait and ours was long."""
        now = self._clock()
        piece_s, self._piece_at = now - self._piece_at, now
        if self._mine and self._slices.is_over(now - self._taken_at, piece_s) and self._library.tandem_turn_is_wanted(self._turns):
            self._give()
            self._take()
            if self._mine:
                self._slices.others_took(self._taken_at - now)

    def _take(self) -> None:
        if self._turns and self._clock() >= self._distrust_until:
            self._mine = bool(self._library.tandem_take_turn(self._turns, _LIMIT_MS))
            self._taken_at = self._piece_at = self._clock()
            if not self._mine:
                self._distrust_until = self._taken_at + _DISTRUST_S

    def _give(self) -> None:
        if self._mine:
            self._mine = False
            self._library.tandem_give_turn(self._turns)


def open_turns(library: ctypes.CDLL, itl_target_ms: int) -> Turns | None:
    """With all processes of this user on the same cores; None if there is no target, and then no waiting for each other."""
    return Turns(library, shared_path(), Slices(itl_target_ms / 1000)) if itl_target_ms else None


def shared_path() -> Path:
    """The same for all processes of a user that may run on the same cores."""
    cores = ",".join(map(str, usable_cores()))
    return _SHARED / f"tandem-turns-{os.getuid()}-{hashlib.blake2b(cores.encode(), digest_size=6).hexdigest()}"

"""Cores shared out among workers that compute at once: two teams on all of them would wait at each barrier for the scheduler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.cores import usable_cores

_SHARED = Path("/dev/shm")


class Seats:
    """What one engine thread tells, and learns, among all processes of this user on the same cores. `cores`: how many these are."""

    def __init__(self, library: ctypes.CDLL, path: Path, cores: int) -> None:
        self._library, self.cores = library, cores
        self._seats = library.tandem_open_seats(os.fsencode(path))
        self._mine = -1
        if self._seats:
            weakref.finalize(self, library.tandem_close_seats, self._seats).atexit = False  # a thread may be computing then

    @property
    def shared(self) -> bool:
        """Whether other processes can be seen at all."""
        return bool(self._seats)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wraps a step; in it, others see that this one computes. Never waits."""
        self._mine = self._library.tandem_take_seat(self._seats) if self._seats else -1
        try:
            yield
        finally:
            if self._mine >= 0:
                self._library.tandem_leave_seat(self._seats, self._mine)

    def share(self) -> int:
        """How many threads to compute with, if all who do just now are to have as many."""
        others = self._library.tandem_count_others(self._seats, self._mine) if self._seats else 0
        return max(1, self.cores // (1 + others))


def open_seats(library: ctypes.CDLL, cores: int) -> Seats:
    """Among all processes of this user that may run on the same cores."""
    cores_named = ",".join(map(str, usable_cores()))
    digest = hashlib.blake2b(cores_named.encode(), digest_size=6).hexdigest()
    return Seats(library, _SHARED / f"tandem-seats-{os.getuid()}-{digest}", cores)

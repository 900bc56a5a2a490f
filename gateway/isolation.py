"""Requests whose worker died go to each worker one at a time, so that a second death points at one of them."""

import asyncio
from collections import defaultdict
from typing import Self

# A request waits for its turn no longer: after an honest loss all of a worker's streams want one.
TURN_WAIT_S = 1.0
# Addresses come and go; more than this are not remembered without need.
MAX_IDLE = 256


class Turn:
    """A request's turn at a worker. To be ended, once or more, when it has got past what may have killed the last one, and at the
    latest with the block that it is used for."""

    def __init__(self, lock: asyncio.Lock | None = None) -> None:
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


class Isolation:
    """One turn at a time per address. Used on the event loop."""

    def __init__(self, turn_wait_s: float = TURN_WAIT_S) -> None:
        self._turn_wait_s = turn_wait_s
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def turn(self, address: str) -> Turn:
        """Waits for the turn; goes without one after `turn_wait_s`."""
        if len(self._locks) > MAX_IDLE:
            self._locks = defaultdict(asyncio.Lock, {known: lock for known, lock in self._locks.items() if lock.locked()})
        lock = self._locks[address]
        try:
            async with asyncio.timeout(self._turn_wait_s):
                await lock.acquire()
        except TimeoutError:
            return Turn()
        return Turn(lock)

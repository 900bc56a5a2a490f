"""Requests whose worker died go to each worker one at a time, so that a second death points at one of them."""

import asyncio
from collections import defaultdict

# A request waits for its turn no longer: after an honest loss all of a worker's streams want one.
TURN_WAIT_S = 1.0


class Turn:
    """A request's turn at a worker. To be ended, once or more, when it has got past what may have killed the last one."""

    def __init__(self, lock: asyncio.Lock | None = None) -> None:
        self._lock = lock

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
        lock = self._locks[address]
        try:
            async with asyncio.timeout(self._turn_wait_s):
                await lock.acquire()
        except TimeoutError:
            return Turn()
        return Turn(lock)

"""When somebody who should speak again and again has been silent for too long."""

import asyncio
from collections.abc import Callable

LATE_S = 0.25
"""A timer that is later than this tells of a process that stood still itself, and says nothing about others."""


class Silence:
    """Calls `end` once if nothing is heard for `limit_s` while this process runs; on the event loop. Close it after use.

    One timer for many words: it looks when the last word was heard, and is set anew for the rest.
    """

    def __init__(self, limit_s: float, end: Callable[[], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.too_long = False
        """`end` has been called."""
        self._loop = loop or asyncio.get_running_loop()
        self._limit_s = limit_s
        self._end = end
        self._due = self._loop.time() + limit_s
        self._timer = self._loop.call_at(self._due, self._look, self._due)

    def heard(self) -> None:
        self._due = self._loop.time() + self._limit_s

    def close(self) -> None:
        """Nothing is called any more. Idempotent."""
        self._timer.cancel()

    def _look(self, expected: float) -> None:
        now = self._loop.time()
        if now > expected + LATE_S:
            self._due = max(self._due, now + self._limit_s)
        if self._due > now:
            self._timer = self._loop.call_at(self._due, self._look, self._due)
        else:
            self.too_long = True
            self._end()

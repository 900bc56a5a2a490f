"""Notices a client that takes nothing: one timer for a stream, since one for each write costs as much as a quarter of the write."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tandem.errors import Reason, TandemError

_CHECKS = 4
"""Looks in the time that a write may take; it is ended a quarter too late at the most."""


class StallWatch:
    """Of one stream's writes; `watching` makes it. Used on the event loop."""

    def __init__(self, limit_s: float, timeout: asyncio.Timeout) -> None:
        self._limit_s = limit_s
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        self._timer = self._loop.call_later(limit_s / _CHECKS, self._check)

    def writing(self) -> None:
        """A write begins."""
        self._began = self._loop.time()

    def written(self) -> None:
        """It has ended."""
        self._began = None

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self._began is not None and self._loop.time() - self._began >= self._limit_s:
            self._timeout.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(self._limit_s / _CHECKS, self._check)


@asynccontextmanager
async def watching(limit_s: float) -> AsyncIterator[StallWatch]:
    """Ends the block with SLOW_READER if one write in it takes longer than `limit_s`."""
    timeout = asyncio.timeout(None)
    try:
        async with timeout:
            watch = StallWatch(limit_s, timeout)
            try:
                yield watch
            finally:
                watch.stop()
    except Exception:  # a cancelled write raises gRPC's own exceptions, too
        if not timeout.expired():
            raise
        raise TandemError(Reason.SLOW_READER, f"the client took nothing for {limit_s:g} s") from None

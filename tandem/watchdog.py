"""Ends a worker that stands still for good, so that whoever started it (`tandem up`, Compose, Kubernetes) starts it again.

It ends from within, since not all of those restart what is merely unhealthy; and at once, since an ordered shutdown would wait for
what is stuck. The gateway has gone on elsewhere long before.
"""

import asyncio
import faulthandler
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)

WEDGED_STATUS = 70
"""Exit status of a worker that stood still; Python gives 1 where native code kept the interpreter."""
LOOKS = 8
"""Within the limit: so often a standing loop is looked at before it is given up."""
NATIVE_FACTOR = 10
"""How much longer native code may keep the interpreter: that alarm goes by the clock, whoever stopped the process."""


def leave_wedged(why: str) -> NoReturn:
    """Says why and where each thread stands, and ends the process."""
    logger.critical("standing still (%s): the process ends, to be started again", why)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(WEDGED_STATUS)


@asynccontextmanager
async def loop_guarded(limit_s: float) -> AsyncIterator[None]:
    """Meanwhile the process ends if its event loop stands still for `limit_s`, and says where each thread stands; 0: never.

    Time in which the process itself was stopped does not count. Native code that keeps the interpreter is given
    `NATIVE_FACTOR` times as long. One for each process.
    """
    if not limit_s:
        yield
        return
    guard = _LoopGuard(limit_s)
    beating = asyncio.create_task(guard.beat())
    guard.start()
    try:
        yield
    finally:
        guard.stop()
        beating.cancel()
        await asyncio.wait([beating])
        faulthandler.cancel_dump_traceback_later()


class LoopJudge:
    """Gives a loop up that has not moved on in `LOOKS` looks, however far apart: who was stopped himself has not looked."""

    def __init__(self) -> None:
        self._num_beats = -1
        self._num_idle_looks = 0

    def stands(self, num_beats: int) -> bool:
        """One look at how often the loop has moved on so far."""
        self._num_idle_looks = self._num_idle_looks + 1 if num_beats == self._num_beats else 0
        self._num_beats = num_beats
        return self._num_idle_looks >= LOOKS


class _LoopGuard:
    """A thread that looks at the loop's beat; the loop's own task beats."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._num_beats = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once nothing is armed any more by the thread."""
        self._stopped.set()
        self._thread.join()

    async def beat(self) -> None:
        while True:
            self._num_beats += 1
            await asyncio.sleep(self._limit_s / (2 * LOOKS))

    def _watch(self) -> None:
        judge = LoopJudge()
        while not self._stopped.wait(self._limit_s / LOOKS):
            faulthandler.dump_traceback_later(NATIVE_FACTOR * self._limit_s, exit=True)
            if judge.stands(self._num_beats):
                leave_wedged(f"event loop for {self._limit_s:g} s")

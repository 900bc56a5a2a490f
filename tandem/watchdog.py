"""Ends a worker that stands still for good, so that whoever started it (`tandem up`, Compose, Kubernetes) starts it again.

It ends from within, since not all of those restart what is merely unhealthy; and at once, since an ordered shutdown would wait for
what is stuck. The gateway has gone on elsewhere long before.
"""

import asyncio
import faulthandler
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)

WEDGED_STATUS = 70
"""Exit status of a worker that stood still; Python gives 1 where the event loop did."""


def leave_wedged(why: str) -> NoReturn:
    """Says why and where each thread stands, and ends the process."""
    logger.critical("standing still (%s): the process ends, to be started again", why)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(WEDGED_STATUS)


@asynccontextmanager
async def loop_guarded(limit_s: float) -> AsyncIterator[None]:
    """Meanwhile the process ends if its event loop stands still for `limit_s`, even in native code that keeps the interpreter, and
    says where each thread stands; 0: never. One for each process."""
    rearming = asyncio.create_task(_rearm(limit_s)) if limit_s else None
    try:
        yield
    finally:
        if rearming is not None:
            rearming.cancel()
            await asyncio.wait([rearming])
            faulthandler.cancel_dump_traceback_later()


async def _rearm(limit_s: float) -> None:
    while True:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        await asyncio.sleep(limit_s / 4)

"""Waiting for what no event tells of."""

import asyncio
from collections.abc import Callable

FIRST_LOOK_S, LONGEST_BETWEEN_S = 0.005, 0.1


async def until(holds: Callable[[], bool]) -> None:
    """Returns soon after it holds: looks often at first, since what is looked at goes on meanwhile and costs events."""
    pause_s = FIRST_LOOK_S
    while not holds():
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_BETWEEN_S)

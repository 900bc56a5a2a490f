"""Whether a worker's work moves on: the policy, and the task that watches. Health follows from this and not from being alive."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

INTERVAL_S = 0.25
SHORTEST_LIMIT_S = 2.0
LONGEST_LIMIT_S = 4.0
"""A stalled worker must say so within 5 s."""
PATIENCE = 4.0
"""How many times the longest pause seen so far may pass without progress."""


@dataclass(frozen=True)
class Work:
    """One kind of work at one moment: whether there is some to do, and how often any of it has moved on so far.

    `excused_s`: how long it may stand still in any case, since others may hold it up.
    """

    waiting: bool
    num_advances: int
    excused_s: float = 0.0


@dataclass
class _Kind:
    num_advances: int = -1
    paused_s: float = 0.0
    longest_pause_s: float = 0.0


class StallJudge:
    """Calls a kind of work stalled that waits and has not moved on for too long, measured by its own longest pause so far."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def observe(self, works: Mapping[str, Work], elapsed_s: float) -> dict[str, float]:
        """Takes in the state of each kind, `elapsed_s` after the one before. Returns the stalled ones, and how long they are so."""
        stalled: dict[str, float] = {}
        for name, work in works.items():
            kind = self._kinds.setdefault(name, _Kind())
            if work.waiting and work.num_advances == kind.num_advances:
                kind.paused_s += elapsed_s
            else:
                kind.longest_pause_s = max(kind.longest_pause_s, kind.paused_s)
                kind.num_advances, kind.paused_s = work.num_advances, 0.0
            if kind.paused_s >= max(_limit_s(kind), work.excused_s):
                stalled[name] = kind.paused_s
        return stalled


def _limit_s(kind: _Kind) -> float:
    return min(LONGEST_LIMIT_S, max(SHORTEST_LIMIT_S, PATIENCE * kind.longest_pause_s))


class ProgressWatch:
    """Looks at the work every `INTERVAL_S` and calls `changed(healthy)` when the verdict changes, and `wedged(why)` at each look
    once some work has stood still for `wedged_s`. A task of the event loop.

    No engine can hold up that loop; where it hangs all the same, the status stream falls silent, which says as much.
    """

    def __init__(
        self,
        works: Callable[[], Mapping[str, Work]],
        changed: Callable[[bool], None],
        wedged: Callable[[str], object] = lambda why: None,
        wedged_s: float = math.inf,
    ) -> None:
        self._works = works
        self._changed = changed
        self._wedged = wedged
        self._wedged_s = wedged_s
        self._judge = StallJudge()
        self._healthy = True
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def look(self, elapsed_s: float) -> None:
        """One look, `elapsed_s` after the one before."""
        stalled = self._judge.observe(self._works(), elapsed_s)
        if self._healthy == bool(stalled):
            self._healthy = not stalled
            if stalled:
                logger.error("no progress: %s", _told(stalled))
            else:
                logger.info("work moves on again")
            self._changed(self._healthy)
        if max(stalled.values(), default=0.0) >= self._wedged_s:
            self._wedged(f"no progress: {_told(stalled)}")

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(INTERVAL_S)
            now = loop.time()
            # A process that was stopped or starved itself has not seen its work stand still for so long.
            self.look(min(now - last, 2 * INTERVAL_S))
            last = now


def _told(stalled: Mapping[str, float]) -> str:
    return ", ".join(f"{name} for {pause_s:.1f} s" for name, pause_s in stalled.items())

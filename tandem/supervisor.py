"""Keeps a set of child processes running: restarts the dead, gives up on the hopeless, stops all in order."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.child_process import Child, ChildSpec, LogFile
from tandem.watchdog import WEDGED_STATUS

__all__ = ["ChildFailedError", "ChildSpec", "Observer", "RestartBudget", "RestartPolicy", "Supervisor"]

# Exit status of a process that was given a bad flag or variable; starting it again changes nothing.
_BAD_CONFIGURATION = 2


@dataclass(frozen=True)
class RestartPolicy:
    """More than `max_deaths` within `window_s` is the end; before that, the n-th death in the window waits `backoff_s[n-1]`."""

    max_deaths: int = 3
    window_s: float = 60.0
    backoff_s: tuple[float, ...] = (0.5, 1.0, 2.0)
    grace_s: float = 12.0


class ChildFailedError(Exception):
    """A child died for good."""

    def __init__(self, name: str, status: int, last_lines: Sequence[str], log_path: Path) -> None:
        super().__init__(f"{name} {describe_status(status)}")
        self.name = name
        self.status = status
        self.last_lines = tuple(last_lines)
        self.log_path = log_path


class Observer(Protocol):
    """Hears what happens to children, on the event loop."""

    def started(self, name: str) -> None: ...
    def line(self, name: str, line: str) -> None: ...
    def died(self, name: str, status: int, restart_in_s: float) -> None: ...


class RestartBudget:
    """Decides whether one child may be started again."""

    def __init__(self, policy: RestartPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._deaths: deque[float] = deque()

    def after_death(self, status: int) -> float | None:
        """Seconds to wait before the next start; None to give up."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - self._policy.window_s:
            self._deaths.popleft()
        if len(self._deaths) > self._policy.max_deaths or status == _BAD_CONFIGURATION:
            return None
        return self._policy.backoff_s[min(len(self._deaths), len(self._policy.backoff_s)) - 1]


class Supervisor:
    """Owns the children of one suite. Used as `async with`: leaving the block stops them all, whatever the reason."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        log_directory: Path,
        observer: Observer,
        policy: RestartPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._policy = policy or RestartPolicy()
        self._observer = observer
        self._clock = clock
        self._sleep = sleep
        self._children = [Child(spec, LogFile(log_directory / f"{spec.name}.log"), observer.line) for spec in specs]
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def children(self) -> Sequence[Child]:
        return self._children

    async def __aenter__(self) -> Supervisor:
        self._keepers = [asyncio.create_task(self._keep(child), name=child.spec.name) for child in self._children]
        return self

    async def __aexit__(self, *_: object) -> None:
        # Shielded: whoever cancels the suite must not interrupt the stopping, or children would outlive it.
        stopping = asyncio.create_task(self.stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            self.kill()
            await stopping
            raise

    async def wait_failed(self) -> None:
        """Return never; raise ChildFailedError when a child has died for good."""
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def stop(self) -> None:
        """Stop all children, order by order, those of one order together; none is started again."""
        ordered = sorted(self._children, key=lambda child: child.spec.stop_order)
        for _, group in itertools.groupby(ordered, key=lambda child: child.spec.stop_order):
            await asyncio.gather(*(child.stop(self._policy.grace_s) for child in group))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for child in self._children:
            child.log.close()

    def kill(self) -> None:
        """End every child at once."""
        for child in self._children:
            child.kill()

    async def _keep(self, child: Child) -> None:
        budget = RestartBudget(self._policy, self._clock)
        while True:
            self._observer.started(child.spec.name)
            status = await child.run_once()
            if status is None:
                return
            wait_s = budget.after_death(status)
            if wait_s is None:
                raise ChildFailedError(child.spec.name, status, child.last_lines, child.log.path)
            self._observer.died(child.spec.name, status, wait_s)
            await self._sleep(wait_s)


def describe_status(status: int) -> str:
    """An exit status for people: "ended with status 1", "was killed by SIGKILL"."""
    if status == WEDGED_STATUS:
        return "made no progress any more and ended itself (its log says where it stood)"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"

"""Who may run now, who waits, and who is turned away."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tandem.errors import Reason, TandemError


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds of the gateway: requests running, requests waiting, and the prompt tokens of those waiting."""

    max_running: int
    max_queued: int
    max_queued_tokens: int


@dataclass(eq=False)
class _Waiter:
    num_tokens: int
    turn: asyncio.Future[None]


class Admission:
    """Lets at most `max_running` requests run; others wait, first come first served, in a bounded queue. Used on the event loop."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiters: deque[_Waiter] = deque()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_queued(self) -> int:
        return len(self._waiters)

    @property
    def num_queued_tokens(self) -> int:
        return sum(waiter.num_tokens for waiter in self._waiters)

    def check(self, num_tokens: int = 0) -> None:
        """Raises QUEUE_FULL if a request of `num_tokens` prompt tokens would be turned away now."""
        if self._has_place():
            return
        limits = self._limits
        if self.num_queued >= limits.max_queued or self.num_queued_tokens + num_tokens > limits.max_queued_tokens:
            raise self._full()

    @asynccontextmanager
    async def place(self, num_tokens: int, deadline: float) -> AsyncIterator[None]:
        """Waits for a place and holds it.

        Raises QUEUE_FULL at once if the queue has no room, DEADLINE_EXCEEDED if `deadline` (monotonic seconds) has passed.
        """
        if deadline <= self._clock():
            raise TandemError(Reason.DEADLINE_EXCEEDED, "the deadline had passed before the request could begin")
        self.check(num_tokens)
        await self._enter(num_tokens)
        try:
            yield
        finally:
            self._leave()

    async def wait_idle(self) -> None:
        """Returns once nothing runs and nothing waits."""
        while self._num_running or self._waiters:
            self._idle.clear()
            await self._idle.wait()

    def _has_place(self) -> bool:
        return self._num_running < self._limits.max_running and not self._waiters

    async def _enter(self, num_tokens: int) -> None:
        if self._has_place():
            self._num_running += 1
            return
        waiter = _Waiter(num_tokens, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter) -> None:
        """A waiter gives up; its turn, if it had come already, goes to the next."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self._note_idle()
        elif not waiter.turn.cancelled():
            self._leave()

    def _leave(self) -> None:
        self._num_running -= 1
        while self._waiters and self._num_running < self._limits.max_running:
            turn = self._waiters.popleft().turn
            if not turn.cancelled():
                self._num_running += 1
                turn.set_result(None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._num_running and not self._waiters:
            self._idle.set()

    def _full(self) -> TandemError:
        return TandemError(
            Reason.QUEUE_FULL,
            f"the gateway is full: {self._num_running} requests run and {self.num_queued} wait",
            metadata={"running_requests": str(self._num_running), "queued_requests": str(self.num_queued)},
        )

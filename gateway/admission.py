"""Who may run now, who waits, and who is turned away."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.drain_rate import DrainRate
from gateway.fair_queue import FairQueue, Waiting
from gateway.routing import Capacity
from tandem.errors import Reason, TandemError

# No more than this part of the time that a request has left may go to waiting, as far as that can be told.
WAITING_SHARE = 0.5
# What a client that is turned away is told to wait, at least and at most.
SHORTEST_RETRY_S = 0.5
LONGEST_RETRY_S = 30.0
# A completion is taken to become this long until some have ended, and then as long as they were on average.
FIRST_COMPLETION_TOKENS = 128
AVERAGE_WEIGHT = 0.05


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds of the gateway: requests running, requests waiting, the prompt tokens of those waiting, and for how long they would
    have to wait, in seconds."""

    max_running: int
    max_queued: int
    max_queued_tokens: int
    max_wait_s: float = 10.0


@dataclass(frozen=True)
class Size:
    """Tokens of a request: of its prompt, and the most that it may generate."""

    prompt_tokens: int
    max_new_tokens: int = 0


@dataclass(eq=False)
class _Turn:
    """`came` gets the tokens that the request counts for while it runs."""

    size: Size
    came: asyncio.Future[float]


class Admission:
    """Lets as many requests run as `max_running` and the decode workers' `capacity` allow; others wait in a bounded, fair queue.

    Used on the event loop.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        clock: Callable[[], float] = time.monotonic,
        capacity: Callable[[], Capacity | None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._capacity = capacity
        self._queue: FairQueue[_Turn] = FairQueue()
        self._rate = DrainRate()
        self._num_running = 0
        self._running_tokens = 0.0
        self._average_completion = float(FIRST_COMPLETION_TOKENS)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_queued(self) -> int:
        return self._queue.num_waiting

    @property
    def num_queued_tokens(self) -> int:
        return self._queue.num_tokens

    def check(self, num_tokens: int = 0) -> None:
        """Raises QUEUE_FULL if a request of `num_tokens` prompt tokens would be turned away now."""
        if not self._may_run(Size(num_tokens)):
            self._check_queue(num_tokens)

    @asynccontextmanager
    async def place(self, size: Size, deadline: float) -> AsyncIterator[None]:
        """Waits for a place and holds it.

        Raises QUEUE_FULL at once if the queue has no room, DEADLINE_EXCEEDED if `deadline` (monotonic seconds) has passed or would
        leave no time to run.
        """
        self._check_deadline(deadline)
        footprint = await self._enter(size, deadline)
        try:
            self._check_deadline(deadline)
            yield
        finally:
            self._leave(footprint)

    def completed(self, num_completion_tokens: int) -> None:
        """A completion has ended with so many tokens."""
        self._average_completion += AVERAGE_WEIGHT * (num_completion_tokens - self._average_completion)

    def capacity_changed(self) -> None:
        """There may be room for those who wait."""
        self._let_in()

    async def wait_idle(self) -> None:
        """Returns once nothing runs and nothing waits."""
        while self._num_running or self.num_queued:
            self._idle.clear()
            await self._idle.wait()

    def _may_run(self, size: Size) -> bool:
        return not self.num_queued and self._has_room(size)

    def _has_room(self, size: Size) -> bool:
        """There is always room for one: a worker knows best whether it holds that."""
        if not self._num_running:
            return True
        if self._num_running >= self._limits.max_running:
            return False
        capacity = self._capacity()
        if capacity is None:
            return True
        fits = self._running_tokens + self._footprint(size) <= capacity.num_tokens
        return self._num_running < capacity.num_requests and fits

    def _footprint(self, size: Size) -> float:
        return size.prompt_tokens + min(size.max_new_tokens, self._average_completion)

    async def _enter(self, size: Size, deadline: float) -> float:
        """Returns the tokens that the request counts for while it runs."""
        if self._may_run(size):
            return self._start(size)
        self._check_queue(size.prompt_tokens)
        waiting = Waiting(size.prompt_tokens, _Turn(size, asyncio.get_running_loop().create_future()))
        self._check_wait(waiting, deadline)
        if not self.num_queued:
            self._rate.began(self._clock())
        self._queue.push(waiting)
        try:
            return await waiting.item.came
        except asyncio.CancelledError:
            self._withdraw(waiting)
            raise

    def _start(self, size: Size) -> float:
        footprint = self._footprint(size)
        self._num_running += 1
        self._running_tokens += footprint
        return footprint

    def _withdraw(self, waiting: Waiting[_Turn]) -> None:
        """A waiter gives up; its turn, if it had come already, goes to the next."""
        came = waiting.item.came
        if self._queue.remove(waiting):
            self._let_in()  # the next one may fit where this one did not
        elif not came.cancelled():
            self._leave(came.result())

    def _leave(self, footprint: float) -> None:
        self._num_running -= 1
        self._running_tokens -= footprint
        self._let_in()

    def _let_in(self) -> None:
        while (first := self._queue.peek()) is not None and self._has_room(first.item.size):
            turn = self._queue.pop().item
            if not turn.came.cancelled():
                self._rate.gave(self._clock())
                turn.came.set_result(self._start(turn.size))
        if not self._num_running and not self.num_queued:
            self._idle.set()

    def _check_deadline(self, deadline: float) -> None:
        if deadline <= self._clock():
            raise TandemError(Reason.DEADLINE_EXCEEDED, "the deadline had passed before the request could begin")

    def _check_queue(self, num_tokens: int) -> None:
        limits = self._limits
        if self.num_queued >= limits.max_queued or self.num_queued_tokens + num_tokens > limits.max_queued_tokens:
            raise self._full()

    def _check_wait(self, newcomer: Waiting[_Turn], deadline: float) -> None:
        """Whoever would wait too long is told so now and not then."""
        now = self._clock()
        wait_s = self._rate.wait_s(self._queue.num_before(newcomer), now)
        if wait_s is None:
            return
        if wait_s > (deadline - now) * WAITING_SHARE:
            message = f"the request would wait for some {wait_s:.1f} s of the {deadline - now:.1f} s that it has"
            raise TandemError(Reason.DEADLINE_EXCEEDED, message)
        if wait_s > self._limits.max_wait_s:
            raise self._full()

    def _full(self) -> TandemError:
        wait_s = self._rate.wait_s(self.num_queued, self._clock())
        return TandemError(
            Reason.QUEUE_FULL,
            f"the gateway is full: {self._num_running} requests run and {self.num_queued} wait",
            metadata={"running_requests": str(self._num_running), "queued_requests": str(self.num_queued)},
            retry_after_s=None if wait_s is None else min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
        )

"""Who may run now, who waits, and who is turned away."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.capacity import Capacity
from gateway.drain_rate import DrainRate
from gateway.fair_queue import FairQueue, Waiting, size_class
from tandem.errors import Reason, TandemError

# No more than this part of the time that a request has left may go to waiting, as far as that can be told.
WAITING_SHARE = 0.5
# Work that the prefill workers are given ahead: enough to be busy, and little beside any deadline. What would wait there for longer
# waits here, where it is ordered, bounded and refused in time.
PREFILL_AHEAD_S = 1.0
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
    max_wait_s: float = 300.0


@dataclass(frozen=True)
class Size:
    """Tokens of a request: of its prompt, and the most that it may generate."""

    prompt_tokens: int
    max_new_tokens: int = 0


@dataclass(eq=False)
class _Running:
    """A request that has its place, and the tokens of decode workers' pools that it counts for.

    Until it is `prefilled`, its prompt is the prefill workers' work.
    """

    size: Size
    footprint: float
    prefilled: bool = False


@dataclass(eq=False)
class _Turn:
    """`came` gets the place."""

    size: Size
    came: asyncio.Future[_Running]


class Admission:
    """Lets as many requests run as `max_running` and the workers' `capacity` allow; others wait in a bounded, fair queue.

    A prompt waits while those of its size and smaller ones are work for `PREFILL_AHEAD_S` already; other sizes may pass it,
    as they do in the prefill workers. Used on the event loop.
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
        self._prefilling: Counter[int] = Counter()
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
        if self.num_queued or not self._has_room(Size(num_tokens)):
            self._check_queue(num_tokens)

    @asynccontextmanager
    async def place(self, size: Size, deadline: float) -> AsyncIterator[Callable[[], None]]:
        """Waits for a place and holds it. Gives what to call once the prompt is computed, idempotent.

        Raises QUEUE_FULL at once if the queue has no room, DEADLINE_EXCEEDED if `deadline` (monotonic seconds) has passed or would
        leave no time to run.
        """
        self._check_deadline(deadline)
        running = await self._enter(size, deadline)
        try:
            self._check_deadline(deadline)
            yield lambda: self._prefilled(running)
        finally:
            self._leave(running)

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
        """Whether a newcomer need not wait; it passes nobody but those who wait for prefill workers."""
        heads = self._queue.heads()
        return (
            not self._prefill_is_busy(size)
            and self._has_room(size)
            and all(self._prefill_is_busy(head.item.size) for head in heads)
        )

    def _prefill_is_busy(self, size: Size) -> bool:
        """One prompt of a size may always be there."""
        return self._prefill_ahead_s(size) > PREFILL_AHEAD_S

    def _prefill_ahead_s(self, size: Size) -> float:
        """Work of the prefill workers that comes before such a prompt."""
        mine = size_class(size.prompt_tokens)
        return self._prefill_s(sum(tokens for other, tokens in self._prefilling.items() if other <= mine))

    def _prefill_s(self, num_tokens: int) -> float:
        """How long all prefill workers take for them; 0 as long as their speed is not known."""
        capacity = self._capacity()
        if capacity is None or not capacity.prefill_tokens_per_s:
            return 0.0
        return num_tokens / capacity.prefill_tokens_per_s

    def _has_room(self, size: Size) -> bool:
        """Of the decode workers. There is always room for one: a worker knows best whether it holds that."""
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

    async def _enter(self, size: Size, deadline: float) -> _Running:
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

    def _start(self, size: Size) -> _Running:
        running = _Running(size, self._footprint(size))
        self._num_running += 1
        self._running_tokens += running.footprint
        self._prefilling[size_class(size.prompt_tokens)] += size.prompt_tokens
        return running

    def _prefilled(self, running: _Running) -> None:
        if not running.prefilled:
            self._count_prefilled(running)
            self._let_in()

    def _count_prefilled(self, running: _Running) -> None:
        if not running.prefilled:
            running.prefilled = True
            self._prefilling[size_class(running.size.prompt_tokens)] -= running.size.prompt_tokens

    def _withdraw(self, waiting: Waiting[_Turn]) -> None:
        """A waiter gives up; its turn, if it had come already, goes to the next."""
        came = waiting.item.came
        if self._queue.remove(waiting):
            self._let_in()  # the next one may fit where this one did not
        elif not came.cancelled():
            self._leave(came.result())

    def _leave(self, running: _Running) -> None:
        self._num_running -= 1
        self._running_tokens -= running.footprint
        self._count_prefilled(running)
        self._let_in()

    def _next(self) -> Waiting[_Turn] | None:
        """The first of those whom the prefill workers have time for, if the decode workers have room for it."""
        for head in self._queue.heads():
            if not self._prefill_is_busy(head.item.size):
                return head if self._has_room(head.item.size) else None
        return None

    def _let_in(self) -> None:
        while (head := self._next()) is not None:
            self._queue.take(head)
            turn = head.item
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
        """Whoever would wait too long, here and then in a prefill worker, is told so now and not then."""
        now = self._clock()
        here_s, there_s = self._waits_s(newcomer, now)
        if here_s + there_s > (deadline - now) * WAITING_SHARE:
            message = f"the request would wait for some {here_s + there_s:.1f} s of the {deadline - now:.1f} s that it has"
            raise TandemError(Reason.DEADLINE_EXCEEDED, message, retry_after_s=_retry_after_s(here_s))
        if here_s > self._limits.max_wait_s:
            raise self._full()

    def _waits_s(self, newcomer: Waiting[_Turn], now: float) -> tuple[float, float]:
        """How long a newcomer would wait here, and in a prefill worker. Places come by the measured rate, and no faster than the
        prefill workers compute what is before them: after a burst only that can tell."""
        number, tokens = self._queue.ahead_of(newcomer)
        size = newcomer.item.size
        there_s = self._prefill_ahead_s(size)
        here_s = there_s - PREFILL_AHEAD_S + self._prefill_s(tokens)
        return max(here_s, self._rate.wait_s(number, now) or 0.0), there_s

    def _full(self) -> TandemError:
        wait_s = self._rate.wait_s(self.num_queued, self._clock())
        return TandemError(
            Reason.QUEUE_FULL,
            f"the gateway is full: {self._num_running} requests run and {self.num_queued} wait",
            metadata={"running_requests": str(self._num_running), "queued_requests": str(self.num_queued)},
            retry_after_s=None if wait_s is None else _retry_after_s(wait_s),
        )


def _retry_after_s(wait_s: float) -> float:
    return min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S)

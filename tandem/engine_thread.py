"""The thread that owns a worker's device, and the way its events reach the event loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from tandem.progress import Work

logger = logging.getLogger(__name__)

Event = TypeVar("Event")
Taken_contra = TypeVar("Taken_contra", contravariant=True)
Result = TypeVar("Result")


class Outlet(Protocol[Taken_contra]):
    """Where events of one kind go, on the event loop."""

    def put(self, event: Taken_contra) -> None: ...


class Mailbox(Generic[Event]):
    """Events of one request on their way to the one coroutine that serves it. Used on the event loop only.

    Whoever reads late gets all that is pending at once, so a slow stream costs one wake-up and not one per token.
    """

    def __init__(self) -> None:
        self._pending: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        self._pending.append(event)
        self._arrived.set()

    async def take(self) -> list[Event]:
        """All pending events in order, at least one."""
        await self._arrived.wait()
        self._arrived.clear()
        pending, self._pending = self._pending, []
        return pending


class Courier:
    """Carries events from any thread to their outlets on the event loop, in the order of sending."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def send(self, deliveries: Sequence[tuple[Outlet[Event], Event]]) -> None:
        """One wake-up of the loop for all deliveries; after the loop has closed they are dropped, since nobody waits."""
        if deliveries and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: Sequence[tuple[Outlet[Event], Event]]) -> None:
    for outlet, event in deliveries:
        outlet.put(event)


class EngineThread:
    """Calls `begin` once, then `step` again and again; waits for `wake` whenever a step found nothing to do.

    An exception in `step` is our bug or a broken device: the thread ends and `on_failure` is called with it, once.
    """

    def __init__(
        self, name: str, begin: Callable[[], None], step: Callable[[], bool], on_failure: Callable[[Exception], None]
    ) -> None:
        self._begin = begin
        self._step = step
        self._on_failure = on_failure
        self._work = threading.Event()
        self._stopping = False
        self._resting = True
        self._num_beats = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._work.set()

    def beat(self) -> None:
        """Says that the present step moves on; from the thread itself."""
        self._num_beats += 1

    def work(self) -> Work:
        """Whether the thread is at work, and how often that has moved on."""
        return Work(not self._resting or self._work.is_set(), self._num_beats)

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after its present step; False if that took longer than `timeout_s`."""
        self._stopping = True
        self._work.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._begin()
            while not self._stopping:
                self._work.clear()
                self._resting = False
                self.beat()
                if not self._step():
                    self._resting = True
                    self._work.wait()
        except Exception as error:
            logger.exception("the engine failed")
            self._on_failure(error)


async def run_and_end_thread(function: Callable[[], Result]) -> Result:
    """Runs a blocking function in a thread that is gone afterwards.

    What computes in parallel leaves a pool of OpenMP threads with its thread. With two pools there are more threads than cores, and
    the runtime then puts idle threads to sleep at once instead of letting them spin: each of an engine's hundreds of operations a
    step would begin by waking them.
    """
    with ThreadPoolExecutor(1, "load") as executor:
        return await asyncio.get_running_loop().run_in_executor(executor, function)


class Speed:
    """Tokens per second while busy: an average in which a second of work weighs half after `half_life_s` of further work."""

    def __init__(self, half_life_s: float = 5.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._half_life_s = half_life_s
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0

    def start(self) -> float:
        return self._clock()

    def add(self, num_tokens: int, started: float) -> None:
        """Counts `num_tokens` computed since `started`, a value of `start()`."""
        seconds = self._clock() - started
        keep = 0.5 ** (seconds / self._half_life_s)
        self._tokens = self._tokens * keep + num_tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

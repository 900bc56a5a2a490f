"""An event loop on virtual time that runs several simulated processes, every choice drawn from one seed.

Callbacks of one process run in their order, as asyncio promises; between processes, which run at the same time in reality, the
seed decides who is next. When nobody has anything to do, time jumps to the next timer.
"""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heappop, heappush
from random import Random
from typing import Any

from tests.simulation.process import PROCESS, Handle, Process, SimulatedFuture, SimulatedTask

TICK_S = 1e-6
"""What a callback takes, so that no two things happen at the same moment."""

START_S = 1000.0
"""The monotonic clock when a simulation begins."""

NEVER = 1 << 62

_SLEEP_IS_OVER = asyncio.futures._set_result_unless_cancelled  # type: ignore[attr-defined]
"""What asyncio.sleep has called when its time has come: it wakes who sleeps."""


class Violation(AssertionError):
    """The system, or the simulation, did what it must never do."""


class SimulatedLoop(asyncio.AbstractEventLoop):
    """See the module. `current` is the process whose callback runs; `world`, `rpc`, `sockets` and `new_executor` are what its
    processes live in."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.numbers = itertools.count(1)
        self.processes: list[Process] = []
        self.num_events = 0
        self.violations: list[str] = []
        self.world: Any = None
        self.rpc: Any = None
        self.sockets: Any = None
        self.new_executor: Callable[[], Any]
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._max_events = self._next_due = NEVER
        self._now = START_S
        self._timers: list[tuple[float, int, list[Any], Process]] = []
        self._able: list[Process] = []
        self.current = self.process("simulator")

    def process(self, name: str) -> Process:
        process = Process(name, self)
        self.processes.append(process)
        return process

    # What product code asks of a loop.

    get_debug = bool
    """False. Asked for every task and future; a function of ours would take longer."""

    def time(self) -> float:
        return self._now

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def create_future(self) -> SimulatedFuture:
        return SimulatedFuture(loop=self)

    def create_task(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> SimulatedTask:  # type: ignore[override]
        return SimulatedTask(coroutine, self, **options)

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        if context is None:
            context, process = copy_context(), self.current
        else:
            process = context.get(PROCESS) or self.current
        handle = Handle((context.run, callback, args))
        if process.alive:
            process.ready.append(handle)
            if not process.able and not process._frozen:  # as `sort_in`, without another call
                process.able = True
                self._able.append(process)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        if context is None:
            context, process = copy_context(), self.current
        else:
            process = context.get(PROCESS) or self.current
        handle = Handle((context.run, callback, args))
        heappush(self._timers, (self._now + delay, next(self.numbers), handle, process))
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        if context is None:
            context, process = copy_context(), self.current
        else:
            process = context.get(PROCESS) or self.current
        handle = Handle((context.run, callback, args))
        heappush(self._timers, (when, next(self.numbers), handle, process))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        future, error = context.get("future"), context.get("exception")
        if isinstance(future, SimulatedTask) and not future.process.alive:
            return  # who would have asked for its failure was killed before
        self.violations.append(f"I6: {self.current}: {context.get('message')}: {error!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(2, 1, 6, "", (host, int(port)))]

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        return asyncio.wrap_future((executor or self.new_executor()).submit(function, *args), loop=self)

    def add_reader(self, sock: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        sock.add_reader(callback, *args)

    def remove_reader(self, sock: Any) -> bool:
        return bool(sock.remove_reader())

    def add_writer(self, sock: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        sock.add_writer(callback, *args)

    def remove_writer(self, sock: Any) -> bool:
        return bool(sock.remove_writer())

    async def sock_connect(self, sock: Any, address: Any) -> None:
        await sock.connect_soon(address)

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:  # type: ignore[override]
        return await sock.first_word()  # type: ignore[no-any-return]

    def add_signal_handler(self, *_: Any) -> None:  # type: ignore[override]
        raise Violation("signals are simulated by calling what handles them")

    # What the simulation asks.

    def deliver(self, process: Process, when: float, callback: Callable[..., Any], *args: Any) -> None:
        """Has another process called back at `when`; if it is frozen, as soon as it is not."""
        heappush(self._timers, (when, next(self.numbers), [process.context.copy().run, callback, args], process))

    def deliver_now(self, process: Process, callback: Callable[[], Any]) -> None:
        """As soon as it comes to its turn."""
        if process.alive:
            process.ready.append([process.context.copy().run, callback, ()])
            if not process.able:
                self.sort_in(process)

    def before_event(self, number: int, callback: Callable[[], None]) -> None:
        """Has `callback` called by the simulator right before the event of that number."""
        number = max(number, self.num_events + 1)
        self._due.setdefault(number, []).append(callback)
        self._next_due = min(self._next_due, number)

    def forget_plans(self) -> None:
        """Drops what `before_event` was given and has not come up."""
        self._due.clear()
        self._next_due = self._max_events

    def sort_in(self, process: Process) -> None:
        """Among those that can go on, or out of them."""
        able = process.alive and not process._frozen and bool(process.ready)
        if able != process.able:
            process.able = able
            (self._able.append if able else self._able.remove)(process)

    def run_until(self, done: "asyncio.Future[Any]", max_events: int) -> None:
        """Lets everything happen until `done`. Violation if that takes too many events, or if nothing is left to happen.

        One function, since it is called between all others, which leave little of it in the processor's caches.
        """
        timers, able, draw = self._timers, self._able, self.random.random
        self._max_events = self._next_due = max_events
        while not done.done():
            while timers and timers[0][0] <= self._now:
                self._ring()
            if not able:
                if not timers:
                    raise Violation("everybody waits for ever")
                self._now = timers[0][0]
                continue
            process = able[0] if len(able) == 1 else able[int(draw() * len(able))]
            ready = process.ready
            if ready[0]:
                self.num_events = number = self.num_events + 1
                self._now += TICK_S
                if number >= self._next_due:
                    self._carry_out_plans()
                    if not process.able or not ready[0]:
                        continue
                self.current = process
                run, callback, args = ready.popleft()
                try:
                    run(callback, *args)
                except Exception as error:
                    self.call_exception_handler({"message": f"in {callback}", "exception": error})
            else:
                ready.popleft()
            if not ready and process.able:
                process.able = False
                able.remove(process)

    def _ring(self) -> None:
        """The next timer is due. The end of a sleep is no event of its own: its sleeper is called next."""
        _, _, handle, process = heappop(self._timers)
        if not handle or not process.alive:
            return
        if handle[1] is _SLEEP_IS_OVER:
            self.current = process
            _SLEEP_IS_OVER(*handle[2])
            return
        process.ready.append(handle)
        if not process.able and not process._frozen:
            process.able = True
            self._able.append(process)

    def _carry_out_plans(self) -> None:
        if self.num_events >= self._max_events:
            raise Violation(f"no end after {self._max_events} events")
        self.current = self.processes[0]
        for callback in self._due.pop(self.num_events, ()):
            callback()
        self._next_due = min([self._max_events, *self._due])

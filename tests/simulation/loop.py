"""An event loop on virtual time that runs several simulated processes, every choice drawn from one seed.

Callbacks of one process run in their order, as asyncio promises; between processes, which run at the same time in reality, the
seed decides who is next. When nobody has anything to do, time jumps to the next timer.
"""

import asyncio
import contextlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any

TICK_S = 1e-6
"""What a callback takes, so that no two things happen at the same moment."""

MANY_TASKS = 100
"""So many are remembered before those that are done are dropped."""

PROCESS: "ContextVar[Process]" = ContextVar("process")


class Violation(AssertionError):
    """The system, or the simulation, did what it must never do."""


class Handle:
    """asyncio.Handle and TimerHandle, with less in it."""

    __slots__ = ("_cancelled", "args", "callback", "context", "moment")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, moment: float = 0.0) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.moment = moment
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self.moment


class Process:
    """A simulated process: its callbacks, tasks and threads. Frozen, it stands still while time goes on; dead, it is no more."""

    def __init__(self, name: str, loop: "SimulatedLoop") -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.ready: deque[Handle] = deque()
        self.able = False
        """Whether the loop has it among those that can go on."""
        self._frozen = False
        self.tasks: set[SimulatedTask] = set()
        self.threads: set[Any] = set()
        self.on_death: list[Callable[[], None]] = []
        self.context: Context = copy_context()
        self.context.run(PROCESS.set, self)

    def __str__(self) -> str:
        return self.name

    @property
    def frozen(self) -> bool:
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        self.loop.sort_in(self)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function as part of this process."""
        before, self.loop.current = self.loop.current, self
        try:
            return self.context.copy().run(function, *arguments)
        finally:
            self.loop.current = before

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return self.run(self.loop.create_task, coroutine)  # type: ignore[no-any-return]

    def kill(self) -> None:
        """As SIGKILL does: nothing of it runs any more. What Python insists on running, `finally` blocks, has no effect outside."""
        if not self.alive:
            return
        self.alive = False
        self.ready.clear()
        self.loop.sort_in(self)
        for hook in self.on_death:
            hook()
        for _ in range(10):
            tasks = self.running_tasks()
            if not tasks and not self.threads:
                break
            for thread in list(self.threads):
                self.run(thread.end)
            for task in tasks:
                self.run(task.end)

    def running_tasks(self) -> "list[SimulatedTask]":
        """In the order in which they were made."""
        self.tasks = {task for task in self.tasks if not task.done()}
        return sorted(self.tasks, key=lambda task: task.number)


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task that knows its process. Numbered, so that sets of tasks have the same order in every run."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], loop: "SimulatedLoop", **options: Any) -> None:
        self.number = next(loop.numbers)
        self.process = loop.current
        self.context: Context = options.pop("context", None) or copy_context()
        super().__init__(coroutine, loop=loop, context=self.context, **options)
        tasks = self.process.tasks
        tasks.add(self)
        if len(tasks) > MANY_TASKS:
            self.process.running_tasks()

    def __hash__(self) -> int:
        return self.number

    def end(self) -> None:
        """Closes the coroutine of a dead process's task."""
        self._log_destroy_pending = False
        self.process.tasks.discard(self)
        coroutine = self.get_coro()
        for _ in range(10):
            try:
                self.context.run(coroutine.close)  # type: ignore[union-attr]
            except BaseException:
                continue
            return


class SimulatedFuture(asyncio.Future):  # type: ignore[type-arg]
    """Numbered, for the same reason."""

    def __init__(self, loop: "SimulatedLoop") -> None:
        self.number = next(loop.numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class SimulatedLoop(asyncio.AbstractEventLoop):
    """See the module. `current` is the process whose callback runs; `world`, `rpc` and `sockets` are what its processes live in."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.numbers = itertools.count(1)
        self.processes: list[Process] = []
        self.num_events = 0
        self.violations: list[str] = []
        self.world: Any = None
        self.rpc: Any = None
        self.sockets: Any = None
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._now = 1000.0
        self._timers: list[tuple[float, int, Handle, Process]] = []
        self._able: list[Process] = []
        self.current = self.process("simulator")

    def process(self, name: str) -> Process:
        process = Process(name, self)
        self.processes.append(process)
        return process

    # What product code asks of a loop.

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def create_future(self) -> SimulatedFuture:
        return SimulatedFuture(self)

    def create_task(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> SimulatedTask:  # type: ignore[override]
        return SimulatedTask(coroutine, self, **options)

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        if context is None:
            context, process = copy_context(), self.current
        else:
            process = context.get(PROCESS, self.current)
        handle = Handle(callback, args, context)
        if process.alive:
            process.ready.append(handle)
            if not process.able:
                self.sort_in(process)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        process = self.current if context is None else context.get(PROCESS, self.current)
        handle = Handle(callback, args, copy_context() if context is None else context, when)
        heapq.heappush(self._timers, (when, next(self.numbers), handle, process))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.violations.append(f"I6: {self.current}: {context.get('message')}: {error!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(2, 1, 6, "", (host, int(port)))]

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        from tests.simulation.threads import SimulatedExecutor

        return asyncio.wrap_future((executor or SimulatedExecutor()).submit(function, *args), loop=self)

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

    def add_signal_handler(self, *_: Any) -> None:  # type: ignore[override]
        raise Violation("signals are simulated by calling what handles them")

    # What the simulation asks.

    def deliver(self, process: Process, when: float, callback: Callable[..., Any], *args: Any) -> None:
        """Has another process called back at `when`; if it is frozen, as soon as it is not."""
        handle = Handle(callback, args, process.context.copy(), when)
        heapq.heappush(self._timers, (when, next(self.numbers), handle, process))

    def before_event(self, number: int, callback: Callable[[], None]) -> None:
        """Has `callback` called by the simulator right before the event of that number."""
        self._due.setdefault(max(number, self.num_events + 1), []).append(callback)

    def forget_plans(self) -> None:
        """Drops what `before_event` was given and has not come up."""
        self._due.clear()

    def sort_in(self, process: Process) -> None:
        """Among those that can go on, or out of them."""
        able = process.alive and bool(process.ready) and not process.frozen
        if able != process.able:
            process.able = able
            (self._able.append if able else self._able.remove)(process)

    def run_until(self, done: "asyncio.Future[Any]", max_events: int) -> None:
        """Lets everything happen until `done`. Violation if that takes too many events, or if nothing is left to happen."""
        with _running(self):
            while not done.done():
                if self.num_events >= max_events:
                    raise Violation(f"no end after {max_events} events")
                self._turn()

    def _turn(self) -> None:
        timers, able = self._timers, self._able
        while timers and timers[0][0] <= self._now:
            self._ring()
        if not able:
            if not timers:
                raise Violation("everybody waits for ever")
            self._now = max(self._now, timers[0][0])
            return
        process = able[0] if len(able) == 1 else able[int(self.random.random() * len(able))]
        if process.ready[0]._cancelled:
            process.ready.popleft()
        else:
            self.num_events += 1
            self._now += TICK_S
            if self.num_events in self._due:
                self._carry_out_plans()
                if not process.able:
                    return
            self.current = process
            handle = process.ready.popleft()
            try:
                handle.context.run(handle.callback, *handle.args)
            except Exception as error:
                self.call_exception_handler({"message": f"in {handle.callback}", "exception": error})
        if not process.ready:
            self.sort_in(process)

    def _ring(self) -> None:
        """The next timer is due."""
        _, _, handle, process = heapq.heappop(self._timers)
        if process.alive and not handle._cancelled:
            process.ready.append(handle)
            if not process.able:
                self.sort_in(process)

    def _carry_out_plans(self) -> None:
        self.current = self.processes[0]
        for callback in self._due.pop(self.num_events):
            callback()


@contextlib.contextmanager
def _running(loop: SimulatedLoop) -> Iterator[None]:
    asyncio._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(None)

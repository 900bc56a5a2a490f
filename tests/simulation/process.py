"""Simulated processes: what a loop runs on behalf of each, how they stand still, and how they die."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.loop import SimulatedLoop

MANY_TASKS = 100
"""So many are remembered before those that are done are dropped."""

PROCESS: "ContextVar[Process]" = ContextVar("process")


class Handle(list[Any]):
    """asyncio.Handle and TimerHandle: what to call in which context, or nothing once cancelled. A list: those are made fast."""

    __slots__ = ()

    def cancel(self) -> None:
        self.clear()

    def cancelled(self) -> bool:
        return not self


class Process:
    """A simulated process: its callbacks, tasks and threads. Frozen, it stands still while time goes on; dead, it is no more."""

    def __init__(self, name: str, loop: "SimulatedLoop") -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.ready: deque[list[Any]] = deque()
        self.able = False
        """Whether the loop has it among those that can go on."""
        self._frozen = False
        self.wall_offset_s = 0.0
        """What its host's wall clock has been set forward, or back."""
        self.tasks: dict[int, SimulatedTask] = {}
        """By number."""
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
        self.tasks = {number: task for number, task in self.tasks.items() if not task.done()}
        return list(self.tasks.values())


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task that knows its process. Numbered, so that sets of tasks have the same order in every run."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], loop: "SimulatedLoop", *, name: Any = None, context: Any = None
    ) -> None:
        self.number = number = next(loop.numbers)
        self.process = process = loop.current
        self.context: Context = context or copy_context()
        super().__init__(coroutine, loop=loop, name=name or "", context=self.context)
        tasks = process.tasks
        tasks[number] = self
        if len(tasks) > MANY_TASKS:
            process.running_tasks()

    def __hash__(self) -> int:
        return self.number

    def end(self) -> None:
        """Closes the coroutine of a dead process's task."""
        self._log_destroy_pending = False
        self.process.tasks.pop(self.number, None)
        coroutine = self.get_coro()
        for _ in range(10):
            try:
                self.context.run(coroutine.close)  # type: ignore[union-attr]
            except BaseException:
                continue
            return


class SimulatedFuture(asyncio.Future):  # type: ignore[type-arg]
    """Numbered once it is put into a set, for the same reason."""

    number = 0

    def __hash__(self) -> int:
        if not self.number:
            self.number = next(self.get_loop().numbers)  # type: ignore[attr-defined]
        return self.number

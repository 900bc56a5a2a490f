"""What callbacks, selectors and threads of a simulated process can wait for: that something can be read or written."""

from collections.abc import Callable
from typing import Any, Protocol

from tests.simulation import threads
from tests.simulation.loop import Violation
from tests.simulation.process import Process


class Wakeable(Protocol):
    """A selector."""

    def wake(self) -> None: ...


class Waited:
    """Of a socket that says whether it is readable and writable, and calls `_changed` whenever that may have changed."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.selectors: list[Wakeable] = []
        self._timeout: float | None = None
        self._reader: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._writer: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._waiting: list[threads.Thread] = []
        self._polled = False

    def readable(self) -> bool:
        raise NotImplementedError

    def writable(self) -> bool:
        raise NotImplementedError

    def _check_open(self) -> None:
        """Raises OSError if it was closed."""
        raise NotImplementedError

    def _wait_for(self, holds: Callable[[], bool]) -> None:
        if holds():
            return
        if self._timeout == 0.0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        thread = threads.current()
        if thread is None:
            raise Violation("an event loop was blocked by a socket")
        loop = self.process.loop
        deadline = None if self._timeout is None else loop.time() + self._timeout
        while not holds():
            if deadline is not None and loop.time() >= deadline:
                raise TimeoutError("timed out")
            if deadline is not None:
                thread.resume(deadline - loop.time())
            self._waiting.append(thread)
            thread.park()
            if thread in self._waiting:
                self._waiting.remove(thread)
            self._check_open()

    def add_reader(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._reader = (callback, arguments)
        self._poll()

    def remove_reader(self) -> bool:
        self._reader, had = None, self._reader is not None
        return had

    def add_writer(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._writer = (callback, arguments)
        self._poll()

    def remove_writer(self) -> bool:
        self._writer, had = None, self._writer is not None
        return had

    def _changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            thread.resume()
        for selector in self.selectors:
            selector.wake()
        self._poll()

    def _poll(self) -> None:
        """Level-triggered, as epoll: asks again as long as somebody is told and does not take."""
        wanted = (self._reader is not None and self.readable()) or (self._writer is not None and self.writable())
        if wanted and not self._polled:
            self._polled = True
            self.process.loop.deliver_now(self.process, self._tell)

    def _tell(self) -> None:
        self._polled = False
        if self._reader is not None and self.readable():
            self._reader[0](*self._reader[1])
        if self._writer is not None and self.writable():
            self._writer[0](*self._writer[1])
        self._poll()

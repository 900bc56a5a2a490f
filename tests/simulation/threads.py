"""Threads of simulated processes: each a greenlet that runs until it waits for something, on the loop's virtual time.

The names are those of the `threading` and `time` modules, which they stand for in the product's modules.
"""

import asyncio
import contextlib
import itertools
import sys
import time as real_time
from collections.abc import Callable, Iterator
from typing import Any

from greenlet import getcurrent, greenlet

from tests.simulation.loop import SimulatedLoop, Violation
from tests.simulation.process import Process

EPOCH_S = 1.7e9
"""The wall clock when the monotonic one is at 0."""


loop: Callable[[], SimulatedLoop] = asyncio.get_running_loop  # type: ignore[assignment]
"""The running simulation's; see `running`."""


@contextlib.contextmanager
def running(simulated: SimulatedLoop) -> Iterator[None]:
    """Makes it the running loop for all who ask.

    Most of them ask what follows, and not asyncio's own function: that one asks the system for the number of the process each time.
    """
    names = ((sys.modules[__name__], "loop"), (asyncio, "get_running_loop"))
    names += ((asyncio.events, "get_running_loop"), (asyncio.events, "_get_running_loop"))
    before = [getattr(module, name) for module, name in names]
    asyncio._set_running_loop(simulated)
    for module, name in names:
        setattr(module, name, itertools.repeat(simulated).__next__)
    try:
        yield
    finally:
        for (module, name), function in zip(names, before, strict=True):
            setattr(module, name, function)
        asyncio._set_running_loop(None)


class Thread:
    """threading.Thread."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        group: None = None,
        target: Callable[..., Any] | None = None,
        name: str = "",
        args: Any = (),
        kwargs: Any = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name
        self.daemon = daemon
        self.ident = next(self._numbers)
        self._work = lambda: target(*args, **(kwargs or {})) if target is not None else None
        self._carrier: Carrier | None = None
        self._process: Process | None = None
        self._over = Event()

    def start(self) -> None:
        self._process = loop().current
        self._process.threads.add(self)
        self._carrier = _idle_carriers.pop() if _idle_carriers else Carrier()
        self._carrier.gr_context = self._process.context.copy()
        self._carrier.simulated_thread = self
        self.resume()

    def is_alive(self) -> bool:
        return self._carrier is not None

    def join(self, timeout: float | None = None) -> None:
        self._over.wait(timeout)

    def resume(self, delay_s: float = 0.0) -> None:
        """Goes on soon with what it was doing when it called `park`."""
        assert self._process is not None
        clock = self._process.loop
        if delay_s > 0.0:
            clock.deliver(self._process, clock.time() + delay_s, self._switch)
        else:
            clock.deliver_now(self._process, self._switch)

    @staticmethod
    def park() -> None:
        """Waits for `resume`; which may also come for another reason than the one waited for."""
        me = getcurrent()
        assert me.parent is not None
        me.parent.switch()

    def end(self) -> None:
        """The process is dead."""
        if self._process is not None:
            self._process.threads.discard(self)
        carrier = self._carrier
        if carrier is not None:
            carrier.parent = getcurrent()  # one that has not run yet would go back to the thread that started it
            carrier.throw()
            if carrier.dead:
                self._carrier = None

    def _switch(self) -> None:
        carrier = self._carrier
        if carrier is not None:
            carrier.parent = getcurrent()
            carrier.switch()
            if self._carrier is None:
                carrier.gr_context = carrier.simulated_thread = None
                _idle_carriers.append(carrier)

    def _run(self) -> None:
        """On the carrier."""
        assert self._process is not None
        try:
            self._work()
        except Exception as error:
            self._process.loop.violations.append(f"I6: {self._process}: thread {self.name} died of {error!r}")
        finally:
            self._process.threads.discard(self)
            self._over.set()
        self._carrier = None


class Carrier(greenlet):
    """Runs one thread after the other, since a greenlet costs more than most threads do. One that is thrown out of is no more."""

    simulated_thread: Thread | None = None

    def run(self) -> None:
        while True:
            assert self.simulated_thread is not None
            self.simulated_thread._run()
            assert self.parent is not None
            self.parent.switch()


_idle_carriers: list[Carrier] = []


def current() -> Thread | None:
    """The simulated thread that runs now; None on the loop itself."""
    return getattr(getcurrent(), "simulated_thread", None)


def _blocking(what: str) -> Thread:
    thread = current()
    if thread is None:
        raise Violation(f"an event loop was blocked by {what}")
    return thread


class Event:
    """threading.Event."""

    def __init__(self) -> None:
        self._flag = False
        self._waiting: list[Thread] = []

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            thread.resume()

    def clear(self) -> None:
        self._flag = False

    def wait(self, timeout: float | None = None) -> bool:
        if self._flag:
            return True
        thread = _blocking("waiting for a threading.Event")
        clock = loop()
        deadline = None if timeout is None else clock.time() + timeout
        while not self._flag and (deadline is None or clock.time() < deadline):
            self._waiting.append(thread)
            if deadline is not None:
                thread.resume(deadline - clock.time())
            thread.park()
            if thread in self._waiting:
                self._waiting.remove(thread)
        return self._flag


class Lock:
    """threading.Lock. Nobody may wait for anything while holding one, so nobody ever waits for one."""

    def __init__(self) -> None:
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._held:
            if not blocking:
                return False
            raise Violation("a lock was held while its owner waited for something else")
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self._held = False


class RLock(Lock):
    """threading.RLock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True


class Local:
    """threading.local, of which a process without real threads needs one value only."""


_MAIN = object()


class Threading:
    """Stands for the module `threading`."""

    Thread = Thread
    Event = Event
    Lock = Lock
    RLock = RLock
    local = Local

    @staticmethod
    def current_thread() -> Any:
        return current()

    @staticmethod
    def main_thread() -> Any:
        return _MAIN

    @staticmethod
    def get_ident() -> int:
        thread = current()
        return 0 if thread is None else thread.ident


class Time:
    """Stands for the module `time`."""

    struct_time = real_time.struct_time

    @staticmethod
    def monotonic() -> float:
        return loop()._now

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        return EPOCH_S + loop()._now + loop().current.wall_offset_s

    @staticmethod
    def monotonic_ns() -> int:
        return round(loop()._now * 1e9)

    perf_counter_ns = monotonic_ns

    @staticmethod
    def time_ns() -> int:
        return round(Time.time() * 1e9)

    @staticmethod
    def sleep(seconds: float) -> None:
        thread = _blocking("time.sleep")
        clock = loop()
        until = clock.time() + seconds
        while clock.time() < until:
            thread.resume(until - clock.time())
            thread.park()

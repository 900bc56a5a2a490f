"""What lets a test steer a fake worker and see what it holds."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tandem.errors import TandemError


class Gates:
    """Phases at which requests wait while the phase's gate is closed, and may fail: each one, or the next one only."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Event] = {}
        self._reached: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.faults: dict[str, BaseException] = {}
        self.next_faults: dict[str, BaseException] = {}

    def close(self, phase: str) -> None:
        self._open[phase] = asyncio.Event()

    def open(self, phase: str) -> None:
        self._open.pop(phase).set()

    async def reached(self, phase: str) -> None:
        """Returns once a request has come to the phase."""
        async with asyncio.timeout(10):
            await self._reached[phase].wait()

    async def passage(self, phase: str) -> None:
        self._reached[phase].set()
        if phase in self._open:
            await self._open[phase].wait()
        if phase in self.next_faults:
            raise self.next_faults.pop(phase)
        if phase in self.faults:
            raise self.faults[phase]


@dataclass
class Book:
    """What happened in a worker. `running` is empty when nothing is held; `ended` has (request id, how) in order."""

    running: set[str] = field(default_factory=set)
    ended: list[tuple[str, str]] = field(default_factory=list)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def entry(self, request_id: str) -> Iterator[None]:
        self.running.add(request_id)
        self.idle.clear()
        how = "cancelled"
        try:
            yield
            how = "ok"
        except TandemError as error:
            how = error.reason.value
            raise
        finally:
            self.running.discard(request_id)
            self.ended.append((request_id, how))
            if not self.running:
                self.idle.set()

    async def wait_idle(self) -> None:
        async with asyncio.timeout(10):
            await self.idle.wait()

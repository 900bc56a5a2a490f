"""One suite of real processes for all tests of a module, and what each test must leave behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from tests.faults.members import Shape
from tests.faults.oracle import Record, stream_problem
from tests.faults.questions import fake_question
from tests.faults.run import BAD_MARKS
from tests.faults.suite import Suite
from tests.faults.traffic import DEADLINE_S, Arrival, Asked, Client

TICK_S = 0.01
SHAPE = Shape(num_prefill=3, step_ms=8.0, restart_s=0.1)


@dataclass
class Patient:
    """A suite to be harmed, and its client."""

    suite: Suite
    client: Client
    _number: int = 0
    _log_sizes: dict[str, int] = field(default_factory=dict)

    def ask(self, kind: str = "plain", prompt_tokens: int = 40, completion_tokens: int = 24) -> Asked:
        """A further request, unlike all others."""
        self._number += 1
        return fake_question(self._number, Arrival(0.0, prompt_tokens, completion_tokens), 0, kind)

    def send(self, count: int, kind: str = "plain", **lengths: int) -> list[Record]:
        return [self.client.send(self.ask(kind, **lengths)) for _ in range(count)]

    async def finish(self, records: Sequence[Record], limit_s: float = DEADLINE_S) -> None:
        """Returns once these requests have ended."""
        async with asyncio.timeout(limit_s):
            while any(record.code is None for record in records):  # noqa: ASYNC110 - of many tasks
                await asyncio.sleep(0.01)

    async def until_flowing(self, records: Sequence[Record], tokens: int = 2) -> None:
        """Each of the requests has some tokens."""
        async with asyncio.timeout(DEADLINE_S):
            while any(len(record.tokens) < tokens and record.code is None for record in records):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def served(self, records: Sequence[Record]) -> None:
        """All of them got every token of an undisturbed run, and no error."""
        await self.finish(records)
        assert [(r.number, r.code, r.reason, r.message) for r in records if r.code != "OK"] == []
        assert [(r.number, problem) for r in records if (problem := stream_problem(r))] == []

    async def send_until_crash(self, name: str, kinds: Sequence[str] = ("plain", "sampled", "stop", "logprobs")) -> list[Record]:
        """Requests until the armed member has died of its failpoint and is here again: a worker that died lately is not the
        gateway's first choice."""
        self.suite.expected_crashes.add(name)
        births, records = self.suite.members[name].births, list[Record]()
        async with asyncio.timeout(20):
            while self.suite.members[name].births == births:
                records += [record for kind in kinds for record in self.send(2, kind)]
                await asyncio.sleep(0.1)
        await self.suite.wait_ready()
        return records

    async def back(self, name: str, births: int) -> None:
        """The member has been started again, and all is whole."""
        await self.suite.wait_born(name, births, 10.0)
        await self.suite.wait_ready()

    def bad_lines(self) -> list[str]:
        """What the logs say since the last time that no log should."""
        found = []
        for name in self.suite.members:
            log, seen = self.suite.log(name), self._log_sizes.get(name, 0)
            found += [f"{name}: {line}" for line in log[seen:].splitlines() if any(mark in line for mark in BAD_MARKS)]
            self._log_sizes[name] = len(log)
        return found

    async def seconds_until_lost(self, name: str, limit_s: float = 6.0) -> float:
        began, address = time.monotonic(), self.suite.members[name].address
        await self.suite.wait_view(
            lambda view: any(worker.address == address and not worker.ready for worker in view.workers), limit_s, f"{name} lost"
        )
        return time.monotonic() - began


@asynccontextmanager
async def machine() -> AsyncIterator[Callable[[], float]]:
    """Gives how late, at worst, this process was run in the meantime, in seconds.

    A suite on a machine that does not run it cannot tell who is dead from who is slow, and nobody can judge it.
    """
    worst_s = 0.0

    async def tick() -> None:
        nonlocal worst_s
        while True:
            began = time.monotonic()
            await asyncio.sleep(TICK_S)
            worst_s = max(worst_s, time.monotonic() - began - TICK_S)

    ticking = asyncio.create_task(tick())
    try:
        yield lambda: worst_s
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Patient]:
    async with Suite(SHAPE, tmp_path_factory.mktemp("suite"), proxied=True) as suite:
        assert suite.channel is not None
        yield Patient(suite, Client(suite.channel))


@pytest_asyncio.fixture(loop_scope="module")
async def patient(shared: Patient) -> AsyncIterator[Patient]:
    """Checks after the test that all is whole, idle and free again, that nobody died unasked, and that no log complains."""
    num_deaths = len(shared.suite.deaths)
    shared.client.records.clear()
    yield shared
    await shared.suite.wait_ready(20.0)
    await shared.suite.wait_idle(10.0)
    shared.suite.expected_crashes.clear()
    assert [death for death in shared.suite.deaths[num_deaths:] if not death.planned] == []
    assert shared.bad_lines() == []

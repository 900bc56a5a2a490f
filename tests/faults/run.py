"""One run: a suite, a load, faults meanwhile, and everything written down that the oracle asks for."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import dataclasses
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.injector import Injector, Links, Plan
from tests.faults.members import FAKE_MODEL, Shape
from tests.faults.memory import Sample
from tests.faults.oracle import Fault, Holdings, Run, leaked
from tests.faults.questions import RealQuestions, fake_question
from tests.faults.suite import Suite
from tests.faults.traffic import DEADLINE_S, Asked, Client, Scale, arrivals

WARM_UP_S = 3.0
SAMPLE_S = 1.0
CLOSING_S = 10.0
NUM_REAL_QUESTIONS = 24
COUNTED = ("received", "ok", "cancelled", "rejected", "failed")
# What no line of a log may hold.
BAD_MARKS = ("Traceback", " ERROR ", " CRITICAL ", "StampError", "never retrieved", "was destroyed but it is pending")


@dataclass(frozen=True)
class Settings:
    """What to run. `plan` None: nothing is harmed. `kind`: of all requests, empty for the usual mix."""

    seconds: float
    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    scale: Scale = field(default_factory=Scale)
    plan: Plan | None = None
    kind: str = ""


@dataclass
class Progress:
    """What a watcher of the run is told. Every attribute is read from time to time."""

    phase: str = "starting"
    fraction: float = 0.0
    num_requests: int = 0
    num_faults: int = 0


@dataclass
class Runner:
    """Runs once. `links` lets faults cut connections of the suite."""

    settings: Settings
    suite: Suite
    links: Links | None = None
    progress: Progress = field(default_factory=Progress)
    _checksum_failures: dict[int, int] = field(default_factory=dict)

    async def run(self) -> Run:
        """The suite serves already. Returns the record; the invariants are for the caller to judge."""
        assert self.suite.channel is not None
        run, client = Run(), Client(self.suite.channel)
        make = await self._questions()
        await self._warm_up(make)
        run.before = await self._holdings()
        await self._load(run, client, make)
        run.records = client.records
        run.idle_after_s = await self._idle()
        run.after = await self._holdings_later(run.before)
        run.counters = await self._counters(run)
        run.flips_caught = sum(self._checksum_failures.values())
        self._write_samples(run)
        self._read_logs(run)
        return run

    async def _questions(self) -> Callable[[int], Asked]:
        settings = self.settings
        found = arrivals(max(settings.seconds, 60.0), settings.scale)
        if settings.shape.model == FAKE_MODEL:
            return lambda number: fake_question(number, found[number % len(found)], settings.seed, settings.kind or None)
        self.progress.phase = "learning the undisturbed answers"
        real = RealQuestions()
        assert self.suite.channel is not None
        await real.learn(self.suite.channel, found, NUM_REAL_QUESTIONS, settings.seed)
        return lambda number: real.question(number, settings.seed, settings.kind or None)

    async def _warm_up(self, make: Callable[[int], Asked]) -> None:
        """Connections between all workers exist afterwards, and what is allocated once is."""
        self.progress.phase = "warming up"
        assert self.suite.channel is not None
        client = Client(self.suite.channel)
        for burst in range(4):  # several at once, or the least loaded pair would serve them all
            for number in range(8):
                client.send(make(1_000_000 + 8 * burst + number))
            await asyncio.sleep(WARM_UP_S / 4)
        await client.finish(DEADLINE_S)
        await self.suite.wait_idle()

    async def _load(self, run: Run, client: Client, make: Callable[[int], Asked]) -> None:
        settings, progress = self.settings, self.progress
        self.progress.phase = "under load"
        plan = [(arrival.at_s, number) for number, arrival in enumerate(arrivals(settings.seconds, settings.scale))]
        began, over = time.monotonic(), asyncio.Event()

        def watch() -> None:
            progress.fraction = min((time.monotonic() - began) / settings.seconds, 1.0)
            progress.num_requests = len(client.records)

        sampling = asyncio.create_task(self._sample(run, client, watch))
        harming = asyncio.create_task(self._harm(run, client, over.is_set))
        try:
            await client.replay([(at_s, _bound(make, number)) for at_s, number in plan], lambda: over.is_set() or harming.done())
            over.set()
            await harming
            await client.finish(DEADLINE_S + 5)
        finally:
            for task in (sampling, harming):
                task.cancel()
            await asyncio.gather(sampling, harming, return_exceptions=True)
        run.planned_load = len(plan) if settings.plan is None or settings.plan.most is None else len(client.records)

    async def _harm(self, run: Run, client: Client, stopped: Callable[[], bool]) -> None:
        if self.settings.plan is None:
            while not stopped():  # noqa: ASYNC110 - the trace's clock
                await asyncio.sleep(SAMPLE_S)
            return
        chance = random.Random(self.settings.seed)
        injector = Injector(self.suite, self.settings.plan, chance, lambda: len(client.running), self.links, run.faults)
        injector.on_fault = self._note_fault
        await injector.run(stopped)

    def _note_fault(self, fault: Fault) -> None:
        """Into a file, too, by the clock of the logs, for whoever looks into a failure."""
        self.progress.num_faults += 1
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - time.monotonic() + fault.moment))
        with (self.suite.directory / "faults.txt").open("a") as file:
            file.write(f"{began} {fault.kind} {fault.target}: detected {fault.detected_s}, whole again {fault.recovered_s}\n")

    async def _sample(self, run: Run, client: Client, watch: Callable[[], None]) -> None:
        while True:
            watch()
            for member in self.suite.members.values():
                with contextlib.suppress(psutil.Error, AssertionError):
                    process = self.suite.process(member.name)
                    rss_bytes, running = process.memory_info().rss, len(client.running)
                    run.samples.append(Sample(member.name, process.pid, client.num_ended, rss_bytes, running))
            await asyncio.sleep(SAMPLE_S)

    def _write_samples(self, run: Run) -> None:
        """For whoever looks into growing memory."""
        with (self.suite.directory / "memory.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(Sample))
            writer.writerows(dataclasses.astuple(sample) for sample in run.samples)

    async def _idle(self) -> float | None:
        self.progress.phase = "quiescing"
        began = time.monotonic()
        try:
            await self.suite.wait_idle(10.0)
        except TimeoutError:
            return None
        return time.monotonic() - began

    async def _holdings(self) -> dict[str, Holdings]:
        found = {}
        for name in self.suite.members:
            with contextlib.suppress(TimeoutError, AssertionError):
                census = await self.suite.census(name)
                found[name] = Holdings(census["tasks"], census["descriptors"])
                self._checksum_failures[census["pid"]] = census["checksum_failures"]
        return found

    async def _holdings_later(self, before: Mapping[str, Holdings]) -> dict[str, Holdings]:
        """As soon as nobody holds more than before; else after the time by which what is idle must have been closed."""
        began = time.monotonic()
        while leaked(before, after := await self._holdings()) and time.monotonic() < began + CLOSING_S:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        return after

    async def _counters(self, run: Run) -> dict[str, Mapping[str, int]]:
        """How requests ended, as each process that lives counts them since its start; all is idle, so none still runs."""
        view = await self.suite.view()
        counted = {"gateway": view.requests} | {worker.address: worker.requests for worker in view.workers}
        run.failover = {each.name: getattr(view.failover, each.name) for each in view.failover.DESCRIPTOR.fields}
        return {name: {how: getattr(counts, how) for how in COUNTED} for name, counts in counted.items()}

    def _read_logs(self, run: Run) -> None:
        run.unplanned_deaths = [
            f"{death.name} (pid {death.pid}) ended with {death.status}" for death in self.suite.deaths if not death.planned
        ]
        for name in self.suite.members:
            lines = self.suite.log(name).splitlines()
            run.flips_sent += sum("a bit of a block was flipped" in line for line in lines)
            run.bad_log_lines += [f"{name}: {line}" for line in lines if any(mark in line for mark in BAD_MARKS)]
            run.stamp_errors += sum("StampError" in line for line in lines)


def _bound(make: Callable[[int], Asked], number: int) -> Callable[[], Asked]:
    return lambda: make(number)


def log_directory(name: str) -> Path:
    """Where a run's logs go: a directory of this process below the system's temporary one."""
    return Path(tempfile.gettempdir()) / f"tandem-faults-{os.getpid()}" / name

"""Runs one seed from start to quiesce and says what was wrong."""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from random import Random

import grpc

from tests.simulation import threads
from tests.simulation.afterwards import Afterwards
from tests.simulation.clients import Clients, Record
from tests.simulation.disturber import Disturber
from tests.simulation.judge import judged, overtaken
from tests.simulation.loop import START_S, SimulatedLoop, Violation
from tests.simulation.records import Records
from tests.simulation.scenario import Scenario, Wish
from tests.simulation.worker import PRODUCT_LOGGERS, Outcome
from tests.simulation.world import World

MAX_EVENTS = 150_000
PROBE = Wish(number=-1, client="probe", starts_at=0.0, prompt=(5, 6, 7, 8, 9), max_tokens=2)
UNREAD_MESSAGES = 2
"""That a slow client's window lets through."""


def run(wanted: Scenario, *, verbose: Callable[[str], None] | None = None) -> Outcome:
    """Simulates a scenario; product modules must be simulated ones."""
    return Simulation(wanted, verbose).run()


class Simulation:
    """One scenario, once."""

    def __init__(self, wanted: Scenario, verbose: Callable[[str], None] | None = None) -> None:
        self.scenario = wanted
        self.loop = SimulatedLoop(Random(wanted.seed * 2))
        self.outcomes: Counter[str] = Counter()
        self._digest = hashlib.blake2b(digest_size=8)
        self._verbose = verbose
        self.world = World(wanted, self.loop, self.note)

    def note(self, text: str) -> None:
        """Something has happened that is part of what the digest stands for."""
        line = self._line(text)
        self._digest.update(line.encode())
        if self._verbose is not None:
            self._verbose(line)

    def run(self) -> Outcome:
        tell = self._verbose
        records = Records(self.world, None if tell is None else lambda text: tell(self._line(text)))
        loggers = [logging.getLogger(name) for name in PRODUCT_LOGGERS]
        for logger in loggers:
            logger.addHandler(records)
        try:
            with threads.running(self.loop):
                self._let_happen()
        finally:
            for logger in loggers:
                logger.removeHandler(records)
        self._digest.update(repr((self.loop.num_events, self.loop.random.random())).encode())
        return Outcome(
            seed=self.scenario.seed,
            num_events=self.loop.num_events,
            digest=int.from_bytes(self._digest.digest()),
            violations=list(dict.fromkeys(self.loop.violations)),
            injected=self.world.injected,
            requests=self.outcomes,
        )

    def _let_happen(self) -> None:
        try:
            main = self.world.simulator.spawn(self._main())
            self.loop.run_until(main, MAX_EVENTS)
            main.result()
        except (Violation, TimeoutError) as violation:
            self.world.violated(repr(violation))
        finally:
            self.world.close()

    async def _main(self) -> None:
        world, disturber, clients = self.world, Disturber(self.world), Clients(self.world)
        for name in self.scenario.slow_clients:
            world.rpc.windows[name] = UNREAD_MESSAGES
        await world.start()
        afterwards = Afterwards(world)
        world.note("all ready")
        disturber.plan(self.scenario.disturbances)
        records = await asyncio.gather(*(clients.ask(wish) for wish in self.scenario.wishes))
        disturber.mend()
        await afterwards.until_quiet()
        undisturbed = not self.scenario.harm and all(record.code is grpc.StatusCode.OK for record in records)
        if not self.loop.violations and not undisturbed:
            records.append(await self._probe(clients))
            await afterwards.until_quiet()
        self._judge(records, afterwards)

    async def _probe(self, clients: Clients) -> Record:
        """Everybody serves again."""
        record = await clients.ask(PROBE)
        if record.code is not grpc.StatusCode.OK or record.tokens != record.expected.tokens:
            self.world.violated(f"I3: a request after all was quiet ended with {record.code}: {record.details}")
        return record

    def _judge(self, records: list[Record], afterwards: Afterwards) -> None:
        for record in records:
            if record.wish is not PROBE:
                self.outcomes[record.code.name if record.code else "NONE"] += 1
                for text in judged(record, self.scenario, self.world):
                    self.world.violated(text)
        if not self.scenario.harm:
            for text in overtaken(records):
                self.world.violated(text)
        if not self.loop.violations:
            afterwards.check_counts(records)

    def _line(self, text: str) -> str:
        return f"{self.loop.time() - START_S:9.6f} #{self.loop.num_events:<6} {text}"

"""Runs one seed from start to quiesce and says what was wrong."""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import grpc
import grpc.aio

from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.channels import open_channel
from tests.simulation.expected import Expected, expected
from tests.simulation.loop import SimulatedLoop, Violation
from tests.simulation.model import LAYOUT
from tests.simulation.process import Process
from tests.simulation.scenario import ROOMY_BLOCKS, Disturbance, Fault, Scenario, Wish, scenario
from tests.simulation.worker import PRODUCT_LOGGERS, Outcome
from tests.simulation.world import MAX_DEADLINE_S, PORT, Records, World

MAX_EVENTS = 150_000
QUIESCE_S = 15.0
KEPT_TASKS = {"KvServer._serve", "ServerCall._run"}
"""Idle connections are kept for the next pull; how many, the transport bounds. Calls are looked at by themselves."""
KEPT_CALLS = {"Watch", "Follow"}
"""The gateway's own streams, one to each worker at most."""


@dataclass
class Record:
    """What became of a wish. `ends` counts how often it ended, which must be once."""

    wish: Wish
    expected: Expected
    started_at: float = 0.0
    ended_at: float = 0.0
    ends: int = 0
    code: grpc.StatusCode | None = None
    details: str = ""
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: generation_pb2.Finished | None = None


def run(seed: int, *, verbose: Callable[[str], None] | None = None) -> Outcome:
    """Simulates the seed's scenario; product modules must be simulated ones."""
    return Simulation(scenario(seed), verbose).run()


class Simulation:
    """One scenario, once."""

    def __init__(self, wanted: Scenario, verbose: Callable[[str], None] | None = None) -> None:
        self.scenario = wanted
        self.loop = SimulatedLoop(Random(wanted.seed * 2))
        self._digest = hashlib.blake2b(digest_size=8)
        self._verbose = verbose
        self.world = World(wanted, self.loop, self.note)
        self.records = [Record(wish, expected(wish)) for wish in wanted.wishes]
        self.outcomes: Counter[str] = Counter()
        self._clients: dict[str, Process] = {}
        self._baseline: Counter[str] = Counter()

    def note(self, text: str) -> None:
        line = f"{self.loop.time() - 1000:9.6f} #{self.loop.num_events:<6} {text}"
        self._digest.update(line.encode())
        if self._verbose is not None:
            self._verbose(line)

    def run(self) -> Outcome:
        records = Records(self.world, every=self._verbose is not None)
        loggers = [logging.getLogger(name) for name in PRODUCT_LOGGERS]
        for logger in loggers:
            logger.addHandler(records)
        try:
            asyncio._set_running_loop(self.loop)
            main = self.world.simulator.spawn(self._main())
            self.loop.run_until(main, MAX_EVENTS)
            main.result()
        except (Violation, TimeoutError) as violation:
            self.violated(repr(violation))
        finally:
            asyncio._set_running_loop(self.loop)
            self.world.close()
            asyncio._set_running_loop(None)
            for logger in loggers:
                logger.removeHandler(records)
        violations = list(dict.fromkeys(self.loop.violations))
        self._digest.update(repr((self.loop.num_events, self.loop.random.random())).encode())
        return Outcome(
            seed=self.scenario.seed,
            num_events=self.loop.num_events,
            digest=int.from_bytes(self._digest.digest()),
            violations=violations,
            injected=self.world.injected,
            requests=self.outcomes,
        )

    def violated(self, text: str) -> None:
        self.loop.violations.append(text)
        self.note(f"VIOLATION {text}")

    async def _main(self) -> None:
        world = self.world
        self.rpc_windows()
        await world.start()
        self._baseline = self._tasks()
        self.note("all ready")
        begin_event = self.loop.num_events
        for disturbance in self.scenario.disturbances:
            self.loop.before_event(begin_event + disturbance.after_events, lambda each=disturbance: self._disturb(each))  # type: ignore[misc]
        await asyncio.gather(*(self._client(record) for record in self.records))
        self._restore()
        await self._quiesce()
        await self._probe()
        self._check_records()

    def rpc_windows(self) -> None:
        for name in self.scenario.slow_clients:
            self.world.rpc.windows[name] = 2

    # Clients.

    def _client(self, record: Record) -> "asyncio.Future[None]":
        """A future that is done once the request has ended at its client."""
        name = record.wish.client
        if name not in self._clients:
            self._clients[name] = self.loop.process(name)
        return self._clients[name].spawn(self._request(record))

    async def _request(self, record: Record) -> None:
        wish = record.wish
        await asyncio.sleep(wish.starts_at)
        record.started_at = self.loop.time()
        async with open_channel(f"gateway:{PORT}") as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request_of(wish), timeout=wish.timeout_s)
            if wish.cancel_after_events is not None:
                client = self.loop.current
                self.loop.before_event(
                    self.loop.num_events + wish.cancel_after_events, lambda: client.run(self._cancel, record, call)
                )
            try:
                async for response in call:
                    self._take(record, response)
                    if wish.read_pause_s:
                        await asyncio.sleep(wish.read_pause_s)
                self._end(record, grpc.StatusCode.OK, "")
            except grpc.aio.AioRpcError as error:
                self._end(record, error.code(), error.details() or "")
            except asyncio.CancelledError:
                self._end(record, grpc.StatusCode.CANCELLED, "")

    def _cancel(self, record: Record, call: grpc.aio.UnaryStreamCall) -> None:
        if call.cancel():
            record.cancelled = True
            self.world.injected["client cancel"] += 1
            self.note(f"request {record.wish.number} cancelled by its client")

    def _take(self, record: Record, response: generation_pb2.GenerateResponse) -> None:
        wish = record.wish
        if record.finished is not None:
            self.violated(f"I1: request {wish.number} went on after its end")
        if response.HasField("finished"):
            record.finished = response.finished
            return
        delta = response.delta
        if delta.index != len(record.tokens):
            self.violated(f"I2: request {wish.number} got token {delta.index} where {len(record.tokens)} was due")
        record.tokens += delta.token_ids
        record.text += delta.text
        if wish.logprobs and [round(each.logprob * -64) for each in delta.logprobs] != list(delta.token_ids):
            self.violated(f"I2: request {wish.number} got log-probabilities of other tokens")
        if not record.expected.begins(record.tokens, record.text):
            self.violated(f"I2: request {wish.number} got {record.tokens}, undisturbed it is {record.expected.tokens}")

    def _end(self, record: Record, code: grpc.StatusCode, details: str) -> None:
        record.ends += 1
        record.code, record.details, record.ended_at = code, details, self.loop.time()
        self.note(f"request {record.wish.number} ended with {code.name} after {len(record.tokens)} tokens {details}")

    # Faults.

    def _disturb(self, what: Disturbance) -> None:
        world, later = self.world, self.loop.time() + what.lasts_s
        self.note(f"fault: {what.fault.value} {what.target} {what.other} {what.lasts_s or ''}")
        world.injected[what.fault.value] += 1
        match what.fault:
            case Fault.KILL:
                world.kill(what.target)
            case Fault.VANISH:
                self._vanish(what.target, later)
            case Fault.FREEZE:
                world.freeze(what.target, True)
                frozen = world.nodes.get(what.target)
                self.loop.deliver(world.simulator, later, self._thaw, what.target, frozen)
            case Fault.CUT:
                ways = [(what.target, what.other)] + ([(what.other, what.target)] if what.both_ways else [])
                world.network.cut(*ways)
                self.loop.deliver(world.simulator, later, world.network.heal, *ways)
            case Fault.DRAIN:
                world.drain(what.target)
            case Fault.CORRUPT:
                world.corruptions_due += what.count
            case Fault.LOSE_RELEASES:
                world.rpc.lost_paths.add("/tandem.worker.v1.KvTransferService/Release")

    def _vanish(self, name: str, later: float) -> None:
        others = {*self.scenario.workers, "gateway", "c0", "c1"} - {name}
        ways = [way for other in others for way in ((name, other), (other, name))]
        self.world.network.cut(*sorted(ways))
        self.world.kill(name)
        self.loop.deliver(self.world.simulator, later, self.world.network.heal, *sorted(ways))

    def _thaw(self, name: str, node: object) -> None:
        if self.world.nodes.get(name) is node:
            self.world.freeze(name, False)

    def _restore(self) -> None:
        """Nothing goes wrong any more."""
        world = self.world
        self.loop.forget_plans()
        world.network.heal_all()
        world.rpc.lost_paths.clear()
        world.corruptions_due = 0
        for name in list(world.nodes):
            world.freeze(name, False)
        self.note("requests are over; nothing goes wrong any more")

    # Afterwards.

    async def _quiesce(self) -> None:
        """I3: everything comes back by itself."""
        deadline = self.loop.time() + QUIESCE_S
        while (held := self._held()) and self.loop.time() < deadline:  # noqa: ASYNC110 - of many objects
            await asyncio.sleep(0.1)
        for what in held:
            self.violated(f"I3: after {QUIESCE_S} s of quiet {what}")
        if not held:
            self.note("quiet")

    def _held(self) -> list[str]:
        world = self.world
        if not world.all_ready:
            return ["the gateway does not know all workers"]
        held = []
        for name, node in world.nodes.items():
            if not node.idle:
                assert node.allocator is not None
                held.append(f"{name} holds {node.allocator.num_blocks - node.allocator.num_free} blocks or tickets")
        calls = Counter(
            call.path for call in world.rpc.open_calls if call.task_process.alive and call.path.rpartition("/")[2] not in KEPT_CALLS
        )
        held += [f"{count} calls of {path} are open" for path, count in calls.items()]
        kept = Counter((call.task_process.name, call.path) for call in world.rpc.open_calls if call.task_process.alive)
        held += [f"{count} calls of {path} are open at {name}" for (name, path), count in kept.items() if count > 1]
        gateway = world.gateway
        if gateway is not None and gateway.num_running:
            held.append(f"the gateway runs {gateway.num_running} requests")
        if not held:
            before, now = self._baseline, self._tasks()
            held += [
                f"tasks of {name}: {now[name]}, were {before[name]}" for name in sorted(now | before) if now[name] > before[name]
            ]
        return held

    def _tasks(self) -> Counter[str]:
        nodes = self.world.nodes.values()
        return Counter(
            f"{node.process.name}/{name}"
            for node in nodes
            for task in node.process.running_tasks()
            if (name := getattr(task.get_coro(), "__qualname__", "")) not in KEPT_TASKS
        )

    async def _probe(self) -> None:
        """Everybody serves again."""
        if self.loop.violations:
            return
        wish = Wish(number=-1, client="probe", starts_at=0.0, prompt=(5, 6, 7, 8, 9), max_tokens=3)
        record = Record(wish, expected(wish))
        await self._client(record)
        if record.code is not grpc.StatusCode.OK or record.tokens != record.expected.tokens:
            self.violated(f"I3: a request after all was quiet ended with {record.code}: {record.details}")

    def _check_records(self) -> None:
        for record in self.records:
            self.outcomes[record.code.name if record.code else "NONE"] += 1
            for text in judged(record, self.scenario, self.world):
                self.violated(text)


def judged(record: Record, scenario: Scenario, world: World) -> list[str]:
    """I1, I2, I9 for one request."""
    wish, found = record.wish, []
    name = f"request {wish.number}"
    if record.ends != 1:
        found.append(f"I1: {name} ended {record.ends} times")
    code = record.code
    if code is grpc.StatusCode.OK:
        if record.finished is None:
            found.append(f"I1: {name} ended OK without its last message")
        elif not record.expected.equals(record.tokens, record.text, record.finished.reason):
            found.append(f"I2: {name} gave {record.tokens}, undisturbed it is {record.expected.tokens}")
    elif must_succeed(wish, scenario):
        found.append(f"A1-A6: {name} failed with {code.name if code else None} for one fault: {record.details}")
    elif code not in allowed(record, scenario, world):
        found.append(f"I9: {name} ended with {code.name if code else None}: {record.details}")
    unhindered = not (gateway_disturbed(scenario) or wish.read_pause_s)  # who reads slowly hears of the end late
    if record.ended_at - record.started_at > limit_s(wish) + 1.0 and unhindered:
        found.append(f"I1: {name} took {record.ended_at - record.started_at:.2f} s, its limit was {limit_s(wish)} s")
    return found


def limit_s(wish: Wish) -> float:
    """The request's deadline, or the gateway's."""
    return MAX_DEADLINE_S if wish.timeout_s is None else min(wish.timeout_s, MAX_DEADLINE_S)


def must_succeed(wish: Wish, scenario: Scenario) -> bool:
    """Whether one fault of one worker is all that stands against a request, and there are other workers, and room."""
    roomy = (
        scenario.prefill_blocks == scenario.decode_blocks == ROOMY_BLOCKS
        and scenario.max_prompts > 8
        and scenario.max_sequences > 8
    )
    alone = len(scenario.prefills) == 1 or len(scenario.decodes) == 1
    poisoned = any(each.poisonous for each in scenario.wishes)
    several = len(scenario.disturbances) > 1 or gateway_disturbed(scenario)
    impatient = wish.cancel_after_events is not None or limit_s(wish) < MAX_DEADLINE_S
    crowded = scenario.max_queued < len(scenario.wishes)
    return roomy and not (alone or poisoned or several or impatient or crowded or wish.client in scenario.slow_clients)


def gateway_disturbed(scenario: Scenario) -> bool:
    return any("gateway" in (each.target, each.other) for each in scenario.disturbances)


def allowed(record: Record, scenario: Scenario, world: World) -> set[grpc.StatusCode]:
    """What may befall a request that is not served."""
    code, wish = grpc.StatusCode, record.wish
    codes = {code.RESOURCE_EXHAUSTED}
    if record.cancelled:
        codes.add(code.CANCELLED)
    if wish.timeout_s is not None or scenario.disturbances:
        codes.add(code.DEADLINE_EXCEEDED)
    if scenario.disturbances or world.poison_deaths:
        codes |= {code.UNAVAILABLE, code.ABORTED}
    if sum(world.deaths[name] for name in scenario.workers) > 1:
        codes.add(code.INTERNAL)  # quarantined: it was there when two workers died in a row
    if wish.poisonous:
        codes |= {code.INTERNAL, code.ABORTED, code.UNAVAILABLE}
    if fits_nowhere(wish, scenario):
        codes.add(code.INVALID_ARGUMENT)
    if any(each.fault is Fault.CORRUPT for each in scenario.disturbances):
        codes.add(code.UNAVAILABLE)
    return codes


def fits_nowhere(wish: Wish, scenario: Scenario) -> bool:
    most = len(wish.prompt) + wish.max_tokens
    return LAYOUT.blocks_for(most) > min(scenario.prefill_blocks, scenario.decode_blocks)


def request_of(wish: Wish) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=wish.prompt),
        sampling=generation_pb2.SamplingParams(seed=wish.number + 7),
        stopping=generation_pb2.StoppingParams(
            max_tokens=wish.max_tokens, min_tokens=wish.min_tokens, ignore_eos=wish.ignore_eos, stop=wish.stop
        ),
        output=generation_pb2.OutputOptions(logprobs=0) if wish.logprobs else None,
    )

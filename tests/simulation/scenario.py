"""What one seed asks for: how the suite is set up, what clients want, and what goes wrong when."""

from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import Any

from tests.simulation.model import CONTEXT_TOKENS, VOCABULARY_SIZE

POISON = 1
"""A token that no one draws; a prompt with it breaks the engine that computes it."""


class Fault(Enum):
    """What can go wrong, apart from what clients do."""

    KILL = "kill"
    VANISH = "vanish"  # killed, and nobody is told: the machine went dark
    FREEZE = "freeze"
    FREEZE_READER = "freeze while reading"  # in the middle of a copy out of a producer's memory
    CUT = "cut"  # one direction or both
    DRAIN = "drain"
    CORRUPT = "corrupt"  # some bit of a block on its way
    LOSE_RELEASES = "lose releases"
    STEP_CLOCK = "step clock"  # the wall clock of one host, by `count` seconds
    POISON = "poison"


@dataclass(frozen=True)
class Disturbance:
    """A fault: `after_events` events after the first request, of `target`, and of `other` where two are concerned."""

    fault: Fault
    after_events: int
    target: str = ""
    other: str = ""
    lasts_s: float = 0.0
    both_ways: bool = True
    count: int = 1


@dataclass(frozen=True)
class Wish:
    """One request and how its client behaves. Times in seconds from the beginning; `cancel_after_events` counts from its start."""

    number: int
    client: str
    starts_at: float
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    timeout_s: float | None = None
    cancel_after_events: int | None = None
    read_pause_s: float = 0.0
    in_a_flood: bool = False

    @property
    def poisonous(self) -> bool:
        return POISON in self.prompt


@dataclass(frozen=True)
class Scenario:
    """All of it."""

    seed: int
    prefills: tuple[str, ...]
    decodes: tuple[str, ...]
    prefill_blocks: int
    decode_blocks: int
    token_budget: int
    max_prompts: int
    max_batch: int
    max_sequences: int
    max_running: int
    max_queued: int
    lease_s: float
    prefix_cache: bool
    transports: tuple[str, ...]
    step_s: float
    device: bool
    slow_clients: tuple[str, ...]
    wishes: tuple[Wish, ...]
    disturbances: tuple[Disturbance, ...] = field(default=())

    @property
    def harm(self) -> tuple[Disturbance, ...]:
        """What goes wrong and may cost something. A wall clock that is set must not: all time is measured by the monotonic one."""
        return tuple(each for each in self.disturbances if each.fault is not Fault.STEP_CLOCK)

    @property
    def workers(self) -> tuple[str, ...]:
        return self.prefills + self.decodes


FAULTS = (
    *(Fault.KILL, Fault.KILL, Fault.VANISH),
    *(Fault.FREEZE, Fault.FREEZE, Fault.CUT, Fault.CUT),
    *(Fault.FREEZE_READER, Fault.DRAIN, Fault.DRAIN, Fault.CORRUPT, Fault.LOSE_RELEASES, Fault.STEP_CLOCK),
)
"""What a disturbance is drawn from."""

ROOMY_BLOCKS = 64
"""More than all requests of a scenario take together, as a rule."""

FLOOD_BLOCKS = 128
SHORT_TOKENS = 4
"""At most, of the short prompt in a flood of long ones."""

EVENTS_PER_WISH = 220
"""Roughly; disturbances come at any of them."""

HOUR_S = 3600


def scenario(seed: int) -> Scenario:
    """The scenario of a seed, always the same."""
    random = Random(seed * 2 + 1)
    kind, usual = random.random(), _scenario(random, seed)
    if kind < 0.04:
        return _flooded(usual, random)
    return _with_a_late_reader(usual, random) if kind < 0.08 else usual


def _flooded(scenario: Scenario, random: Random) -> Scenario:
    """With long prompts for one prefill worker, then a short one (E2). There is room for all; what goes wrong is left as it was."""
    longs = [_long(random, number) for number in range(5)]
    short = replace(
        longs[0], number=5, starts_at=random.uniform(0.004, 0.02), prompt=_tokens(random, random.randint(1, SHORT_TOKENS))
    )
    return replace(
        scenario,
        prefills=scenario.prefills[:1],
        prefill_blocks=FLOOD_BLOCKS,
        decode_blocks=FLOOD_BLOCKS,
        token_budget=random.choice((8, 16)),
        step_s=0.002,
        wishes=(*longs, short),
        disturbances=tuple(each for each in scenario.disturbances if "p1" not in (each.target, each.other)),
        **_WITHOUT_LIMITS,
    )


def _with_a_late_reader(scenario: Scenario, random: Random) -> Scenario:
    """With a consumer that stands still in the middle of a copy until its lease is over and others have the blocks, and which
    then goes on before the gateway has noticed."""
    wishes = tuple(
        replace(
            _long(random, number),
            starts_at=0.0 if number < 2 else random.uniform(0.8, 1.8),
            prompt=_tokens(random, random.randint(20, 40)),
            in_a_flood=False,
        )
        for number in range(8)
    )
    return replace(
        scenario,
        prefills=scenario.prefills[:1],
        decodes=("d0", "d1"),
        prefill_blocks=14,
        decode_blocks=ROOMY_BLOCKS,
        lease_s=1.0,
        prefix_cache=False,
        transports=("shm",),
        step_s=0.0005,
        wishes=wishes,
        disturbances=(Disturbance(Fault.FREEZE_READER, 0, "d0", lasts_s=random.uniform(1.3, 1.8)),),
        **_WITHOUT_LIMITS,
    )


_WITHOUT_LIMITS: dict[str, Any] = {"max_prompts": 16, "max_sequences": 16, "max_running": 16, "max_queued": 8, "slow_clients": ()}


def _long(random: Random, number: int) -> Wish:
    prompt = _tokens(random, random.randint(48, 60))
    return Wish(number, client="c0", starts_at=0.0, prompt=prompt, max_tokens=random.randint(1, 4), in_a_flood=True)


def _scenario(random: Random, seed: int) -> Scenario:
    prefills = tuple(f"p{number}" for number in range(random.choice((1, 2, 2))))
    decodes = tuple(f"d{number}" for number in range(random.choice((1, 2, 2))))
    clients = tuple(f"c{number}" for number in range(2))
    num_wishes = random.randint(2, 6)
    scarce = random.random() < 0.5
    wishes = _wishes(random, num_wishes, clients)
    return Scenario(
        seed=seed,
        prefills=prefills,
        decodes=decodes,
        prefill_blocks=random.randint(12, 24) if scarce else ROOMY_BLOCKS,
        decode_blocks=random.randint(14, 26) if scarce else ROOMY_BLOCKS,
        token_budget=random.choice((5, 8, 16, 64)),
        max_prompts=random.choice((2, 16)) if scarce else 16,
        max_batch=random.choice((1, 4, 8)),
        max_sequences=random.choice((2, 16)) if scarce else 16,
        max_running=random.choice((2, 4, 16)),
        max_queued=random.choice((1, 8)) if scarce else 8,
        lease_s=random.choice((1.0, 5.0)),
        prefix_cache=random.random() < 0.8,
        transports=random.choice((("shm",), ("tcp",), ("shm", "tcp"))),
        step_s=random.choice((0.0005, 0.002, 0.02)),
        device=random.random() < 0.5,
        slow_clients=("c1",) if random.random() < 0.15 else (),
        wishes=wishes,
        disturbances=_disturbances(random, prefills, decodes, num_wishes * EVENTS_PER_WISH),
    )


def _wishes(random: Random, count: int, clients: tuple[str, ...]) -> tuple[Wish, ...]:
    shared = [_tokens(random, random.randint(6, 20)) for _ in range(2)]
    poisoned = random.randrange(count) if random.random() < 0.08 else -1
    return tuple(_wish(random, number, clients, shared, number == poisoned) for number in range(count))


def _wish(random: Random, number: int, clients: tuple[str, ...], shared: list[tuple[int, ...]], poisoned: bool) -> Wish:
    prompt = (random.choice(shared) if random.random() < 0.5 else ()) + _tokens(random, random.randint(1, 24))
    max_tokens = min(random.choice((1, 2, random.randint(3, 30))), CONTEXT_TOKENS - len(prompt))
    if poisoned:
        at = random.randrange(len(prompt))
        prompt = (*prompt[:at], POISON, *prompt[at + 1 :])
    return Wish(
        number=number,
        client=random.choice(clients),
        starts_at=random.choice((0.0, random.uniform(0.0, 0.05), random.uniform(0.0, 1.0))),
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=random.choice((0, 0, min(4, max_tokens))),
        ignore_eos=random.random() < 0.3,
        stop=tuple(random.sample("0123456789", 2)) if random.random() < 0.2 else (),
        logprobs=random.random() < 0.2,
        timeout_s=random.choice((0.0, 0.001, 0.05, 0.3)) if random.random() < 0.12 else random.choice((None, 25.0)),
        cancel_after_events=random.randint(0, 2 * EVENTS_PER_WISH) if random.random() < 0.2 else None,
        read_pause_s=random.choice((0.0, 0.0, 0.0, 0.05)),
    )


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(3, VOCABULARY_SIZE) for _ in range(count))


def _disturbances(random: Random, prefills: tuple[str, ...], decodes: tuple[str, ...], num_events: int) -> tuple[Disturbance, ...]:
    if random.random() < 0.1:
        when = random.randint(0, num_events)
        return tuple(_cut(random, prefills, decodes, when) for _ in range(2))  # two links at the same moment
    count = random.choice((0, 1, 1, 1, 2, 3))
    return tuple(_disturbance(random, prefills, decodes, random.randint(0, num_events)) for _ in range(count))


def _disturbance(random: Random, prefills: tuple[str, ...], decodes: tuple[str, ...], when: int) -> Disturbance:
    fault = random.choice(FAULTS)
    worker = random.choice(prefills + decodes)
    match fault:
        case Fault.KILL | Fault.VANISH | Fault.FREEZE | Fault.DRAIN if random.random() < 0.15:
            worker = "gateway"
        case Fault.CUT:
            return _cut(random, prefills, decodes, when)
        case Fault.CORRUPT:
            return Disturbance(fault, when, count=random.choice((1, 1, 2, 5)))
        case Fault.FREEZE_READER:
            # Long enough for the lease to end, and early, so that there is something to read.
            return Disturbance(fault, when // 4, random.choice(decodes), lasts_s=random.choice((1.5, 3.0, 6.0)))
        case Fault.STEP_CLOCK:
            return Disturbance(fault, when, random.choice((worker, "gateway")), count=random.choice((-HOUR_S, HOUR_S)))
    return Disturbance(fault, when, worker, lasts_s=random.choice((0.1, 0.7, 1.5, 3.0, 6.0)))


def _cut(random: Random, prefills: tuple[str, ...], decodes: tuple[str, ...], when: int) -> Disturbance:
    prefill, decode = random.choice(prefills), random.choice(decodes)
    one, other = random.choice((("gateway", decode), ("gateway", prefill), (decode, prefill), ("c0", "gateway")))
    if random.random() < 0.5:
        one, other = other, one
    return Disturbance(Fault.CUT, when, one, other, random.choice((0.2, 1.0, 3.0, 6.0)), both_ways=random.random() < 0.4)

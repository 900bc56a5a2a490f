"""Draws the scenario of a seed."""

from random import Random

from tests.simulation import special
from tests.simulation.model import CONTEXT_TOKENS
from tests.simulation.scenario import POISON, ROOMY_BLOCKS, Disturbance, Fault, Scenario, Wish
from tests.simulation.special import tokens

FAULTS = (
    *(Fault.KILL, Fault.KILL, Fault.VANISH),
    *(Fault.FREEZE, Fault.FREEZE, Fault.CUT, Fault.CUT),
    *(Fault.FREEZE_READER, Fault.DRAIN, Fault.DRAIN, Fault.CORRUPT, Fault.LOSE_RELEASES, Fault.STEP_CLOCK),
)
"""What a disturbance is drawn from."""

EVENTS_PER_WISH = 150
"""Most of what a request takes; disturbances come at any of them, and hardly ever when all is over."""

HOUR_S = 3600


def scenario(seed: int) -> Scenario:
    """The scenario of a seed, always the same."""
    random = Random(seed * 2 + 1)
    kind, usual = random.random(), _usual(random, seed)
    for share, change in special.KINDS:
        if kind < share:
            return change(usual, random)
        kind -= share
    return usual


def _usual(random: Random, seed: int) -> Scenario:
    prefills = tuple(f"p{number}" for number in range(random.choice((1, 2, 2))))
    decodes = tuple(f"d{number}" for number in range(random.choice((1, 2, 2))))
    clients = tuple(f"c{number}" for number in range(2))
    num_wishes = random.choice((2, 2, 3, 3, 4))
    scarce = random.random() < 0.5
    wishes = _wishes(random, num_wishes, clients)
    return Scenario(
        seed=seed,
        prefills=prefills,
        decodes=decodes,
        prefill_blocks=random.randint(8, 16) if scarce else ROOMY_BLOCKS,
        decode_blocks=random.randint(10, 18) if scarce else ROOMY_BLOCKS,
        token_budget=random.choice((5, 8, 16, 64)),
        max_prompts=random.choice((2, 16)) if scarce else 16,
        max_batch=random.choice((1, 4, 8)),
        max_sequences=random.choice((2, 16)) if scarce else 16,
        max_running=random.choice((1, 2, 16)),
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
    shared = [tokens(random, random.randint(4, 12)) for _ in range(2)]
    poisoned = random.randrange(count) if random.random() < 0.08 else -1
    return tuple(_wish(random, number, clients, shared, number == poisoned) for number in range(count))


def _wish(random: Random, number: int, clients: tuple[str, ...], shared: list[tuple[int, ...]], poisoned: bool) -> Wish:
    prompt = (random.choice(shared) if random.random() < 0.5 else ()) + tokens(random, random.randint(1, 16))
    max_tokens = min(random.choice((1, 2, random.randint(3, 24))), CONTEXT_TOKENS - len(prompt))
    if poisoned:
        at = random.randrange(len(prompt))
        prompt = (*prompt[:at], POISON, *prompt[at + 1 :])
    return Wish(
        number=number,
        client=random.choice(clients),
        starts_at=random.choice((0.0, random.uniform(0.0, 0.05), random.uniform(0.0, 0.4))),
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=random.choice((0, 0, min(4, max_tokens))),
        ignore_eos=random.random() < 0.3,
        stop=tuple(random.sample("0123456789", 2)) if random.random() < 0.2 else (),
        logprobs=random.random() < 0.2,
        timeout_s=random.choice((0.0, 0.001, 0.05, 0.3)) if random.random() < 0.12 else random.choice((None, 25.0)),
        cancel_after_events=random.randint(0, 2 * EVENTS_PER_WISH) if random.random() < 0.2 else None,
        read_pause_s=random.choice((0.0, 0.0, 0.0, 0.03)),
    )


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

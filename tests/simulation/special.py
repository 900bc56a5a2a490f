"""Scenarios made for one thing each, out of a usual one."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from tests.simulation.model import VOCABULARY_SIZE
from tests.simulation.scenario import ROOMY_BLOCKS, SHORT_TOKENS, Disturbance, Fault, Scenario, Wish

FLOOD_BLOCKS = 128

_WITHOUT_LIMITS: dict[str, Any] = {"max_prompts": 16, "max_sequences": 16, "max_running": 16, "max_queued": 8, "slow_clients": ()}


def flooded(scenario: Scenario, random: Random) -> Scenario:
    """With long prompts for one prefill worker, then a short one (E2). There is room for all; in a few, what goes wrong is left
    as it was, which is then not judged by who came first."""
    disturbed = random.random() < 0.2
    longs = [_long(random, number) for number in range(4)]
    short = replace(
        longs[0], number=4, starts_at=random.uniform(0.004, 0.012), prompt=tokens(random, random.randint(1, SHORT_TOKENS))
    )
    return replace(
        scenario,
        prefills=scenario.prefills[:1],
        prefill_blocks=FLOOD_BLOCKS,
        decode_blocks=FLOOD_BLOCKS,
        token_budget=random.choice((8, 16)),
        step_s=0.002,
        wishes=(*longs, short),
        disturbances=tuple(each for each in scenario.disturbances if "p1" not in (each.target, each.other)) if disturbed else (),
        **_WITHOUT_LIMITS,
    )


def with_a_late_reader(scenario: Scenario, random: Random) -> Scenario:
    """With a consumer that stands still in the middle of a copy until its lease is over and others have the blocks, and which
    then goes on before the gateway has noticed."""
    wishes = tuple(
        replace(
            _long(random, number),
            starts_at=0.0 if number < 2 else random.uniform(0.8, 1.8),
            prompt=tokens(random, random.randint(20, 40)),
            max_tokens=random.randint(1, 2),
            in_a_flood=False,
        )
        for number in range(5)
    )
    return replace(
        scenario,
        prefills=scenario.prefills[:1],
        decodes=("d0", "d1"),
        prefill_blocks=11,
        decode_blocks=ROOMY_BLOCKS,
        lease_s=1.0,
        prefix_cache=False,
        transports=("shm",),
        step_s=0.0005,
        wishes=wishes,
        disturbances=(Disturbance(Fault.FREEZE_READER, 0, "d0", lasts_s=random.uniform(1.3, 1.8)),),
        **_WITHOUT_LIMITS,
    )


def with_leavers(scenario: Scenario, random: Random) -> Scenario:
    """With steps that take long, requests whose time is up in the middle of one, and others that are given their blocks at once and
    have something to write into them: what all prompts begin with."""
    shared, wishes = tokens(random, 16), []
    for number in range(0, 6, 3):
        leaver = replace(
            _long(random, number),
            starts_at=random.uniform(0.0, 0.2),
            prompt=shared + tokens(random, random.randint(1, 4)),
            max_tokens=12,
            ignore_eos=True,
            timeout_s=random.uniform(0.3, 0.6),
            in_a_flood=False,
        )
        ends_at = leaver.starts_at + (leaver.timeout_s or 0.0)
        joiners = [
            replace(
                leaver,
                number=number + 1 + index,
                starts_at=ends_at + random.uniform(-0.01, 0.02),
                prompt=shared + tokens(random, random.randint(1, 4)),
                max_tokens=2,
                timeout_s=None,
            )
            for index in range(2)
        ]
        wishes += [leaver, *joiners]
    return replace(
        scenario,
        prefills=("p0",),
        decodes=("d0",),
        prefill_blocks=FLOOD_BLOCKS,
        decode_blocks=FLOOD_BLOCKS,
        token_budget=64,
        max_batch=8,
        prefix_cache=True,
        step_s=0.1,
        wishes=tuple(wishes),
        disturbances=(),
        **_WITHOUT_LIMITS,
    )


def with_a_sleeper_and_a_loss(scenario: Scenario, random: Random) -> Scenario:
    """With a worker, the only one of its kind, that stands still as the first request comes to it, and one of the other kind that
    is lost meanwhile, or asked to leave: the sleeper goes on with what is true no more."""
    event, decode_sleeps = random.randint(10, 30), random.random() < 0.7
    prefills, decodes = (scenario.prefills, ("d0",)) if decode_sleeps else (("p0",), scenario.decodes)
    sleeper, others = ("d0", prefills) if decode_sleeps else ("p0", decodes)
    fault = random.choice((Fault.KILL, Fault.VANISH, Fault.VANISH, Fault.DRAIN))
    return replace(
        scenario,
        prefills=prefills,
        decodes=decodes,
        transports=("shm",),
        wishes=tuple(replace(each, starts_at=0.1 * each.number, cancel_after_events=None) for each in scenario.wishes[:2]),
        disturbances=(
            Disturbance(Fault.FREEZE, event, sleeper, lasts_s=random.choice((0.3, 0.8, 1.5))),
            Disturbance(fault, event + random.randint(0, 4), random.choice(others), lasts_s=2.5),
        ),
    )


def hurried(scenario: Scenario, random: Random) -> Scenario:
    """With a prefill worker that stands still for a moment while the time of prompts runs out that it has begun with, or not."""
    wishes = tuple(
        replace(each, starts_at=random.uniform(0.0, 0.01), timeout_s=random.choice((0.03, 0.05)), cancel_after_events=None)
        for each in scenario.wishes
    )
    asleep = Disturbance(Fault.FREEZE, random.randint(10, 50), "p0", lasts_s=0.1)
    return replace(scenario, prefills=("p0",), step_s=0.002, wishes=wishes, disturbances=(asleep,))


def _long(random: Random, number: int) -> Wish:
    prompt = tokens(random, random.randint(48, 60))
    return Wish(number, client="c0", starts_at=0.0, prompt=prompt, max_tokens=random.randint(1, 4), in_a_flood=True)


def tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(3, VOCABULARY_SIZE) for _ in range(count))


KINDS: tuple[tuple[float, Callable[[Scenario, Random], Scenario]], ...] = (
    *((0.02, flooded), (0.05, with_a_late_reader), (0.02, with_leavers), (0.03, with_a_sleeper_and_a_loss), (0.02, hurried)),
)
"""With the share of the seeds that are of each."""

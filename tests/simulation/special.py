"""Scenarios made for one thing each, out of a usual one."""

from dataclasses import replace
from random import Random
from typing import Any

from tests.simulation.model import VOCABULARY_SIZE
from tests.simulation.scenario import ROOMY_BLOCKS, SHORT_TOKENS, Disturbance, Fault, Scenario, Wish

FLOOD_BLOCKS = 128

_WITHOUT_LIMITS: dict[str, Any] = {"max_prompts": 16, "max_sequences": 16, "max_running": 16, "max_queued": 8, "slow_clients": ()}


def flooded(scenario: Scenario, random: Random) -> Scenario:
    """With long prompts for one prefill worker, then a short one (E2). There is room for all; what goes wrong is left as it was."""
    longs = [_long(random, number) for number in range(5)]
    short = replace(
        longs[0], number=5, starts_at=random.uniform(0.004, 0.02), prompt=tokens(random, random.randint(1, SHORT_TOKENS))
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


def with_a_late_reader(scenario: Scenario, random: Random) -> Scenario:
    """With a consumer that stands still in the middle of a copy until its lease is over and others have the blocks, and which
    then goes on before the gateway has noticed."""
    wishes = tuple(
        replace(
            _long(random, number),
            starts_at=0.0 if number < 2 else random.uniform(0.8, 1.8),
            prompt=tokens(random, random.randint(20, 40)),
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


def _long(random: Random, number: int) -> Wish:
    prompt = tokens(random, random.randint(48, 60))
    return Wish(number, client="c0", starts_at=0.0, prompt=prompt, max_tokens=random.randint(1, 4), in_a_flood=True)


def tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(3, VOCABULARY_SIZE) for _ in range(count))

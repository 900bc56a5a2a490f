"""What each request of a scenario may end with (I1, I2, I9, A1 to A6, E2)."""

from collections.abc import Sequence
from itertools import combinations

import grpc

from tests.simulation.clients import Record
from tests.simulation.model import LAYOUT
from tests.simulation.scenario import ROOMY_BLOCKS, SHORT_TOKENS, Fault, Scenario, Wish
from tests.simulation.world import MAX_DEADLINE_S, World


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
    """Whether all that stands against a request is one fault of one worker, or broken links that spare a pair of workers, and
    there are other workers, and room."""
    roomy = (
        min(scenario.prefill_blocks, scenario.decode_blocks) >= ROOMY_BLOCKS
        and scenario.max_prompts > 8
        and scenario.max_sequences > 8
    )
    alone = len(scenario.prefills) == 1 or len(scenario.decodes) == 1
    poisoned = any(each.poisonous for each in scenario.wishes)
    several = len(scenario.harm) > 1 and not links_spare_a_pair(scenario)
    impatient = wish.cancel_after_events is not None or limit_s(wish) < MAX_DEADLINE_S
    crowded = scenario.max_queued < len(scenario.wishes)
    hopeless = alone or poisoned or several or impatient or crowded or gateway_in_trouble(scenario)
    return roomy and not hopeless and wish.client not in scenario.slow_clients


def links_spare_a_pair(scenario: Scenario) -> bool:
    """Whether nothing but links break, and one prefill and one decode worker keep theirs to each other and to the gateway."""
    if any(each.fault is not Fault.CUT for each in scenario.harm):
        return False
    broken = {frozenset((each.target, each.other)) for each in scenario.harm}
    pairs = ((prefill, decode) for prefill in scenario.prefills for decode in scenario.decodes)
    return any(broken.isdisjoint(map(frozenset, combinations(("gateway", *pair), 2))) for pair in pairs)


def gateway_in_trouble(scenario: Scenario) -> bool:
    """Itself, or its way to its clients."""
    workers = set(scenario.workers)
    return any("gateway" in (each.target, each.other) and not workers & {each.target, each.other} for each in scenario.harm)


def gateway_disturbed(scenario: Scenario) -> bool:
    return any("gateway" in (each.target, each.other) for each in scenario.harm)


def allowed(record: Record, scenario: Scenario, world: World) -> set[grpc.StatusCode]:
    """What may befall a request that is not served."""
    code, wish = grpc.StatusCode, record.wish
    codes = {code.RESOURCE_EXHAUSTED}
    if record.cancelled:
        codes.add(code.CANCELLED)
    if wish.timeout_s is not None or scenario.harm:
        codes.add(code.DEADLINE_EXCEEDED)
    if scenario.harm or world.poison_deaths:
        codes |= {code.UNAVAILABLE, code.ABORTED}
    if sum(world.deaths[name] for name in scenario.workers) > 1:
        codes.add(code.INTERNAL)  # quarantined: it was there when two workers died in a row
    if wish.poisonous:
        codes |= {code.INTERNAL, code.ABORTED, code.UNAVAILABLE}
    if fits_nowhere(wish, scenario):
        codes.add(code.INVALID_ARGUMENT)
    if any(each.fault is Fault.CORRUPT for each in scenario.harm):
        codes.add(code.UNAVAILABLE)
    return codes


def fits_nowhere(wish: Wish, scenario: Scenario) -> bool:
    most = len(wish.prompt) + wish.max_tokens
    return LAYOUT.blocks_for(most) > min(scenario.prefill_blocks, scenario.decode_blocks)


def overtaken(records: Sequence[Record]) -> list[str]:
    """E2, of a flood: a short prompt does not wait for all the long ones that were there before it."""
    shorts = [record for record in records if record.wish.in_a_flood and len(record.wish.prompt) <= SHORT_TOKENS]
    longs = [record.first_token_at or 0.0 for record in records if record.wish.in_a_flood and record not in shorts]
    return [
        f"E2: request {short.wish.number} of {len(short.wish.prompt)} tokens waited for all {len(longs)} long prompts before it"
        for short in shorts
        if short.first_token_at is not None and all(short.first_token_at > at for at in longs)
    ]

"""Hand-offs break between two workers that live: other pairs are tried, and the same one again when it has healed."""

import asyncio

import pytest

from gateway.failover import MAX_MOVES
from tandem.errors import Reason, TandemError
from tests.service.gateway.conftest import MakeSuite
from tests.service.gateway.moved_streams import expected, first_choice

HANDOFF_BREAKS = [Reason.TICKET_NOT_FOUND, Reason.KV_CHECKSUM_MISMATCH, Reason.TRANSFER_INTERRUPTED]


@pytest.mark.parametrize("reason", HANDOFF_BREAKS)
async def test_a_broken_handoff_is_tried_once_more_on_another_pair(make_suite: MakeSuite, reason: Reason) -> None:
    suite = await make_suite(2, 2)
    first, second = first_choice(suite.decodes)
    first.gates.faults["pull"] = TandemError(reason, "broken")
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert [len(worker.requests) for worker in first_choice(suite.prefills)] == [1, 1]
    assert second.requests[0].attempt == second.requests[0].ticket.epoch == 2
    await suite.all_idle()


@pytest.mark.parametrize("reason", HANDOFF_BREAKS)
async def test_a_handoff_that_always_breaks_ends_the_request(make_suite: MakeSuite, reason: Reason) -> None:
    """With nothing delivered, after the one retry of the only pair."""
    suite = await make_suite(1, 1)
    suite.prefill.gates.close("run")
    suite.decode.gates.faults["pull"] = TandemError(reason, "broken")
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is not None
    assert answer.error.reason is Reason.WORKER_LOST
    assert len(suite.decode.requests) == 2
    await suite.all_idle()


async def test_a_stream_does_not_go_on_for_ever_over_a_pair_that_always_breaks(make_suite: MakeSuite) -> None:
    """Each attempt's first token comes from its prefill worker."""
    suite = await make_suite(1, 1)
    suite.decode.pull_fault = lambda ticket: True
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is not None
    assert answer.error.reason is Reason.STREAM_BROKEN
    assert len(answer.token_ids) <= len(suite.decode.requests) == MAX_MOVES


async def test_a_stream_with_tokens_goes_on_when_its_only_pair_has_healed(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 1)
    suite.decode.pull_fault = lambda ticket: True
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await suite.until(lambda: len(suite.decode.requests) == 4)
    suite.decode.pull_fault = lambda ticket: False
    answer = await answering
    assert (answer.error, answer.token_ids) == (None, expected(10))


async def test_two_broken_links_in_a_row_cost_a_pause(make_suite: MakeSuite) -> None:
    """Of the four pairs, both that do not share a worker are broken; then the third is asked, also by later requests."""
    suite = await make_suite(2, 2)
    prefills, decodes = first_choice(suite.prefills), first_choice(suite.decodes)
    broken = {(prefills[0].address, decodes[0]), (prefills[1].address, decodes[1])}
    for decode in decodes:
        decode.pull_fault = lambda ticket, decode=decode: (ticket.address, decode) in broken  # type: ignore[misc]
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert (answer.error, answer.token_ids) == (None, expected(10))
    num_asked = sum(len(decode.requests) for decode in decodes)
    assert num_asked == 3
    for number in range(5):
        assert (await suite.generate(text=f"hello {number}", stopping={"max_tokens": 10})).error is None
    assert sum(len(decode.requests) for decode in decodes) == num_asked + 5, "nobody tries a broken pair again"

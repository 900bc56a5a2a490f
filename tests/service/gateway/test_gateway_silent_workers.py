"""Workers that are frozen, stalled, leaving, or another process all at once: none of that is the request's doing."""

import asyncio
import time

import pytest

from gateway.workers import WatchTimes
from tandem.api.v1 import operations_pb2
from tandem.errors import Reason, TandemError
from tests.service.gateway.conftest import MakeSuite, Suite
from tests.service.gateway.moved_streams import PREFILL_PHASES, expected, first_choice


async def test_a_frozen_decode_worker_is_left_and_its_late_tokens_are_not_taken(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    first.gates.close("token 4")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await first.gates.reached("token 4")
    began = time.monotonic()
    first.fall_silent()
    second.gates.close("token 7")
    await second.gates.reached("token 7")
    assert time.monotonic() - began < 5  # 2 s in a process of its own
    first.gates.open("token 4")  # it wakes up
    first.speak_again()
    await suite.until(lambda: not first.book.running)
    second.gates.open("token 7")
    assert (await answering).token_ids == expected(10)
    await suite.until(lambda: all(worker.ready for worker in suite.gateway.directory.workers))


@pytest.mark.parametrize("replaced", [False, True])
async def test_two_frozen_workers_under_one_request_are_not_its_doing(make_suite: MakeSuite, replaced: bool) -> None:
    """Also where somebody puts other processes in their place."""
    suite = await make_suite(1, 3)
    suite.gateway.directory._times = WatchTimes(silence_s=0.5)
    first, second, third = sorted(suite.decodes, key=lambda worker: worker.address)
    first.gates.close("token 4")
    second.gates.close("token 5")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    for frozen, phase in ((first, "token 4"), (second, "token 5")):
        await frozen.gates.reached(phase)
        frozen.fall_silent()
        await suite.until(lambda frozen=frozen: frozen.address in lost_addresses(suite))
        if replaced:
            frozen.become_another()
            frozen.speak_again()
    answer = await answering
    assert (answer.error, answer.token_ids) == (None, expected(10))
    assert [request.attempt for worker in (first, second, third) for request in worker.requests] in ([1, 2, 3], [1, 3, 2])


def lost_addresses(suite: Suite) -> set[str]:
    return {worker.address for worker in suite.gateway.directory.workers if not worker.worker_id}


async def test_a_stalled_worker_is_left_if_there_is_another(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    first.gates.close("token 4")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await first.gates.reached("token 4")
    first.say(condition=operations_pb2.WORKER_CONDITION_STALLED)
    assert (await answering).token_ids == expected(10)
    assert len(second.requests) == 1


async def test_a_stalled_worker_without_another_may_still_do_it(suite: Suite) -> None:
    suite.decode.gates.close("token 4")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await suite.decode.gates.reached("token 4")
    suite.decode.say(condition=operations_pb2.WORKER_CONDITION_STALLED)
    await suite.until(lambda: not suite.gateway.server.ready)
    suite.decode.gates.open("token 4")
    assert (await answering).token_ids == expected(10)
    assert len(suite.decode.requests) == 1


@pytest.mark.parametrize("phase", ["reserve", "pull", "run", "token 1", "token 4"])
async def test_f1_a_leaving_decode_worker_hands_its_stream_over(make_suite: MakeSuite, phase: str) -> None:
    """It ends with DRAINING what takes longer than it can wait."""
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    first.gates.close(phase)
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await first.gates.reached(phase)
    first.gates.faults[phase] = TandemError(Reason.DRAINING, "leaving")
    first.say(condition=operations_pb2.WORKER_CONDITION_DRAINING)
    await suite.until(lambda: sum(worker.ready for worker in suite.gateway.directory.workers) == 2)
    assert not answering.done(), "until then it goes on"
    first.gates.open(phase)
    answer = await answering
    assert (answer.error, answer.token_ids) == (None, expected(10))
    assert len(second.requests) == 1
    await suite.all_idle()


@pytest.mark.parametrize("phase", PREFILL_PHASES)
async def test_f1_a_leaving_prefill_worker_hands_its_prompt_over(make_suite: MakeSuite, phase: str) -> None:
    suite = await make_suite(2, 1)
    first, second = first_choice(suite.prefills)
    first.gates.close(phase)
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await first.gates.reached(phase)
    first.gates.faults[phase] = TandemError(Reason.DRAINING, "leaving")
    first.say(condition=operations_pb2.WORKER_CONDITION_DRAINING)
    first.gates.open(phase)
    answer = await answering
    assert (answer.error, answer.token_ids) == (None, expected(10))
    assert len(second.requests) == 1
    await suite.all_idle()


async def test_a_worker_with_a_new_identity_is_another_worker(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    first.gates.close("token 4")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await first.gates.reached("token 4")
    first.become_another()
    await suite.until(lambda: len(first.requests) + len(second.requests) == 2)
    first.gates.open("token 4")  # who has taken its place may be the one that goes on
    answer = await answering
    assert (answer.error, answer.token_ids) == (None, expected(10))
    assert [request.attempt for request in (*first.requests, *second.requests)] == [1, 2]

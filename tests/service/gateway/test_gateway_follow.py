"""A gateway that follows its decode workers: the same streams, whatever overtakes what and whoever knows no Follow calls."""

import asyncio

import pytest

from tandem.errors import Reason, TandemError
from tests.fakes.workers import letters, spelling
from tests.service.gateway.conftest import MakeSuite, Suite

PROMPT = [3 + byte for byte in b"hello"]


def expected(num_tokens: int) -> list[int]:
    return [letters(PROMPT, index) for index in range(num_tokens)]


async def followed(suite: Suite) -> None:
    fleet = suite.gateway._fleet
    await suite.until(lambda: all(fleet.follows(worker) for worker in fleet.workers if worker.role.value == "decode"))


async def test_tokens_come_by_the_follow_call(suite: Suite) -> None:
    await followed(suite)
    answers = await asyncio.gather(*(suite.generate(text="hello", stopping={"max_tokens": 10}) for _ in range(5)))
    assert [answer.token_ids for answer in answers] == [expected(10)] * 5
    assert all(request.follower_id for request in suite.decode.requests)
    assert len({request.stream_number for request in suite.decode.requests}) == 5
    await suite.all_idle()


async def test_tokens_that_overtake_the_first_wait_for_it(suite: Suite) -> None:
    await followed(suite)
    suite.prefill.gates.close("first")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 6}))
    await suite.decode.gates.reached("end")
    suite.prefill.gates.open("first")
    assert (await answering).token_ids == expected(6)


async def test_a_stop_string_ends_the_worker_s_part_at_once(make_suite: MakeSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.attempt.LAST_WORDS_S", 60.0)
    suite = await make_suite(token=spelling("one. two. three."))
    await followed(suite)
    suite.decode.gates.close("token 3")
    suite.decode.gates.close("token 6")
    text = ""
    async for response in suite.call(timeout=5, text="hello", stopping={"max_tokens": 16, "stop": [" t"]}):
        text += response.delta.text
        if len(text) == 3:  # by now the worker's own call has nothing more to say
            suite.decode.gates.open("token 3")
    assert text == "one."
    await suite.all_idle()


async def test_a_worker_without_follow_calls_serves_as_ever(make_suite: MakeSuite) -> None:
    suite = await make_suite(wait=False)
    suite.decode.gates.faults["follow"] = TandemError(Reason.UNIMPLEMENTED, "an older worker")
    await suite.until(lambda: all(worker.ready for worker in suite.gateway.directory.workers))
    for _ in range(3):
        assert (await suite.generate(text="hello", stopping={"max_tokens": 10})).token_ids == expected(10)
    assert not any(request.follower_id for request in suite.decode.requests)
    assert suite.decode.interceptor.counts["/tandem.worker.v1.DecodeService/Follow"].received == 1


async def test_streams_survive_the_end_of_the_call_that_carries_them(suite: Suite) -> None:
    await followed(suite)
    suite.decode.gates.close("token 5")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await suite.decode.gates.reached("token 5")
    suite.decode.gates.next_faults["followed"] = TandemError(Reason.INTERNAL, "broken")
    suite.decode.gates.open("token 5")
    answer = await answering
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert len(suite.decode.requests) == 2
    await suite.all_idle()

"""Workers die, break and lie while they hold requests: clients see a pause, and exactly the tokens of a quiet run."""

import asyncio
import time
from typing import Any

import grpc
import pytest

from gateway.isolation import Turn
from gateway.routing import Worker
from tandem.api.v1 import generation_pb2
from tandem.errors import Reason, TandemError
from tests.fakes.workers import FakeDecode, letters, spelling
from tests.service.gateway.conftest import Answer, MakeSuite, Suite
from tests.service.gateway.moved_streams import PREFILL_PHASES, PROMPT, expected, first_choice, interrupted

DECODE_PHASES = ("reserve", "pull", "run", "token 1", "token 5", "token 8")


def shape(answer: Answer) -> list[object]:
    """All that a client can tell of a stream, whatever its cuts into messages."""
    prompts = [delta.prompt for delta in answer.deltas if delta.HasField("prompt")]
    logprobs = [logprob for delta in answer.deltas for logprob in delta.logprobs]
    usage = answer.finished.usage
    return [answer.token_ids, answer.text, prompts, logprobs, answer.finished.reason, usage]


@pytest.mark.parametrize("phase", PREFILL_PHASES)
async def test_a_prefill_worker_lost_before_the_first_token_is_replaced(make_suite: MakeSuite, phase: str) -> None:
    suite = await make_suite(2, 1)
    first, second = first_choice(suite.prefills)
    answer = await interrupted(suite, first, phase)
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert [request.attempt for request in second.requests] == [2]
    assert suite.gateway.counts().num_retries == 1
    await suite.all_idle()


@pytest.mark.parametrize("phase", DECODE_PHASES)
async def test_a_decode_worker_lost_at_any_time_is_replaced(make_suite: MakeSuite, phase: str) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    answer = await interrupted(suite, first, phase)
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert answer.finished.usage.completion_tokens == 10
    (resumed,) = second.requests
    assert resumed.attempt == 2
    assert resumed.num_prompt_tokens == len(PROMPT)
    delivered = len(resumed.token_ids) - len(PROMPT)
    assert list(resumed.token_ids) == [*PROMPT, *expected(delivered)]
    await suite.all_idle()


async def test_the_last_token_may_be_all_that_is_left(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    answer = await interrupted(suite, first, "token 9")
    assert answer.token_ids == expected(10)
    assert not second.requests  # prefill draws it, and no hand-off follows
    assert suite.prefill.requests[1].first_token_only


FIELDS: list[dict[str, object]] = [
    {"output": {"logprobs": 3, "prompt_logprobs": 2, "echo": True}},
    {"sampling": {"temperature": 0.7, "seed": 7, "repetition_penalty": 1.2}},
    {"stopping": {"max_tokens": 12, "min_tokens": 6}},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("phase", ["run", "token 4"])
async def test_nothing_tells_a_moved_stream_from_a_quiet_one(make_suite: MakeSuite, fields: dict[str, Any], phase: str) -> None:
    suite = await make_suite(1, 2)
    suite.prefill.cached_tokens = 3
    first, _ = first_choice(suite.decodes)
    moved = await interrupted(suite, first, phase, **fields)
    quiet = await suite.generate(**{"text": "hello", "stopping": {"max_tokens": 10}, **fields})
    assert shape(moved) == shape(quiet)
    assert suite.gateway.counts().num_migrations == 1


async def test_a_resumed_prefill_gives_its_prompt_once_and_may_use_its_cache(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, _ = first_choice(suite.decodes)
    answer = await interrupted(suite, first, "token 4", output={"prompt_logprobs": 1})
    assert sum(delta.HasField("prompt") for delta in answer.deltas) == 1
    before, after = suite.prefill.requests
    assert before.HasField("prompt_logprobs") and not after.HasField("prompt_logprobs")


@pytest.mark.parametrize(("stop", "phase"), [("lo w", "token 4"), ("lo w", "token 5"), ("world", "token 8")])
async def test_a_stop_string_half_seen_when_the_worker_dies_is_still_found(make_suite: MakeSuite, stop: str, phase: str) -> None:
    suite = await make_suite(1, 2, token=spelling("hello world, and more", then=3 + ord("x")))
    first, _ = first_choice(suite.decodes)
    answer = await interrupted(suite, first, phase, stopping={"max_tokens": 20, "stop": [stop]})
    assert answer.error is None
    assert answer.text == "hello world, and more".partition(stop)[0]
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("reason", [Reason.ENGINE_FAILED, Reason.INTERNAL, Reason.CANCELLED])
@pytest.mark.parametrize(("kind", "phase"), [("prefill", "run"), ("decode", "token 3")])
async def test_a_failing_engine_is_replaced(make_suite: MakeSuite, kind: str, phase: str, reason: Reason) -> None:
    suite = await make_suite(2, 2)
    first, second = first_choice(suite.prefills if kind == "prefill" else suite.decodes)
    first.gates.faults[phase] = TandemError(reason, "broken")
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert len(second.requests) == 1


async def test_what_a_prefill_failure_does_to_decode_is_not_blamed_on_decode(make_suite: MakeSuite) -> None:
    suite = await make_suite(2, 2)
    (prefill, _), (decode, _) = first_choice(suite.prefills), first_choice(suite.decodes)
    decode.gates.close("pull")
    decode.gates.faults["pull"] = TandemError(Reason.ENGINE_FAILED, "the prefill failed")
    prefill.gates.close("run")
    prefill.gates.faults["run"] = TandemError(Reason.ENGINE_FAILED, "broken")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await decode.gates.reached("pull")
    await prefill.gates.reached("run")
    decode.gates.open("pull")
    await suite.until(lambda: not decode.book.running)
    del decode.gates.faults["pull"]
    prefill.gates.open("run")
    assert (await answering).token_ids == expected(10)
    assert len(decode.requests) == 2  # it was asked again: not it had failed


async def test_a_gap_is_noticed_and_made_good(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    first.skipped_index = 3
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is None
    assert answer.token_ids == expected(10)
    assert len(second.requests) == 1


async def test_a_completion_waits_for_its_only_worker_to_come_back(suite: Suite) -> None:
    port = int(suite.decode.address.rpartition(":")[2])
    suite.decode.gates.close("token 4")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 10}))
    await suite.decode.gates.reached("token 4")
    await suite.decode.kill()
    await suite.until(lambda: not suite.gateway.server.ready)
    successor = FakeDecode(suite.model.digest, letters)
    await successor.start(port)
    answer = await answering
    assert answer.error is None
    assert answer.token_ids == expected(10)
    await successor.kill()


async def test_a_completion_waits_for_room_in_the_workers_that_are_left(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = first_choice(suite.decodes)
    second.gates.faults["reserve"] = TandemError(Reason.KV_BLOCKS_EXHAUSTED, "no room")
    answering = asyncio.create_task(interrupted(suite, first, "token 4"))
    await suite.until(lambda: len(second.requests) == 2)
    del second.gates.faults["reserve"]
    assert (await answering).token_ids == expected(10)


async def test_without_any_worker_a_broken_completion_ends_in_the_end(make_suite: MakeSuite) -> None:
    suite = await make_suite(resume_wait_s=0.3)
    answer = await interrupted(suite, suite.decode, "token 4")
    assert answer.error is not None
    assert (answer.error.reason, answer.error.code) == (Reason.STREAM_BROKEN, grpc.StatusCode.ABORTED)
    assert answer.error.metadata["tokens_delivered"] == str(len(answer.token_ids)) == "4"
    assert answer.token_ids == expected(4)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_with_all_workers_of_a_kind_gone_requests_fail_soon_and_nothing_piles_up(make_suite: MakeSuite, kind: str) -> None:
    suite = await make_suite(2, 2)
    gone = suite.prefills if kind == "prefill" else suite.decodes
    await asyncio.gather(*(worker.kill() for worker in gone))
    began = time.monotonic()
    answers = await asyncio.gather(*(suite.generate(text=f"hello {number}") for number in range(50)))
    assert time.monotonic() - began < 2
    for answer in answers:
        assert answer.error is not None
        assert answer.error.code is grpc.StatusCode.UNAVAILABLE
        assert answer.error.retry_after_s
    assert suite.gateway.num_running == 0


async def test_a_turn_ends_also_if_its_worker_is_gone_by_then(make_suite: MakeSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = await make_suite(2, 1)
    relay, lock, gone = suite.gateway._relay, asyncio.Lock(), [True]
    channel = relay._fleet.channel

    async def turn(*_: object) -> Turn:
        await lock.acquire()
        return Turn(lock)

    def channel_of(worker: Worker) -> grpc.aio.Channel:
        if gone and gone.pop():
            raise TandemError(Reason.WORKER_LOST, "it is no longer known")
        return channel(worker)

    monkeypatch.setattr(relay, "_turn", turn)
    monkeypatch.setattr(relay._fleet, "channel", channel_of)
    assert (await suite.generate(5, text="hello", stopping={"max_tokens": 10})).token_ids == expected(10)
    assert not lock.locked()

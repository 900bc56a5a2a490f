"""Workers die, freeze, lie and come back while they hold requests: clients see a pause, and exactly the tokens of a quiet run."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from gateway.failover import MAX_MOVES
from gateway.isolation import Turn
from gateway.routing import Worker
from gateway.workers import WatchTimes
from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason, TandemError
from tests.fakes.workers import FakeDecode, FakePrefill, FakeWorker, letters, spelling
from tests.service.gateway.conftest import Answer, MakeSuite, Suite, collect

PROMPT = [3 + byte for byte in b"hello"]
PREFILL_PHASES = ("queue", "admit", "run")
DECODE_PHASES = ("reserve", "pull", "run", "token 1", "token 5", "token 8")


def expected(num_tokens: int) -> list[int]:
    return [letters(PROMPT, index) for index in range(num_tokens)]


def first_choice(workers: Sequence[FakeWorker]) -> tuple[Any, Any]:
    """Of two idle workers: the one that is chosen, and the other."""
    chosen, other = sorted(workers, key=lambda worker: worker.address)
    return chosen, other


async def interrupted(suite: Suite, worker: FakeWorker, phase: str, **fields: object) -> Answer:
    """A request whose worker is killed at a phase: at "token N" the client has all tokens before it."""
    worker.gates.close(phase)
    answer = Answer()
    call = suite.call(**{"text": "hello", "stopping": {"max_tokens": 10}, **fields})
    answering = asyncio.create_task(collect(call, answer))
    await worker.gates.reached(phase)
    await suite.until(lambda: len(answer.token_ids) >= int(phase.partition("token ")[2] or 0))
    await worker.kill()
    return await answering


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
    assert (await answering).token_ids == expected(10)
    assert [request.attempt for request in (*first.requests, *second.requests)] == [1, 2]


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


class TestPoison:
    """A request under which worker after worker dies."""

    @pytest.mark.parametrize("word", [Reason.ENGINE_FAILED, Reason.CANCELLED])
    async def test_it_costs_two_workers_and_fails_alone(self, make_suite: MakeSuite, word: Reason) -> None:
        """Whether the worker still says so, or only its address tells."""
        suite = await make_suite(1, 3)
        for decode in suite.decodes:
            decode.token = deadly(decode, 4, word)
        innocent = [asyncio.create_task(suite.generate(text=f"i{number}", stopping={"max_tokens": 400})) for number in range(8)]
        await suite.until(lambda: sum(len(decode.book.running) for decode in suite.decodes) == 8)
        answer = await suite.generate(text="poison", stopping={"max_tokens": 10})
        assert answer.error is not None
        assert (answer.error.reason, answer.error.code) == (Reason.REQUEST_QUARANTINED, grpc.StatusCode.INTERNAL)
        assert answer.error.metadata["worker_deaths"] == "2"
        assert answer.error.metadata["tokens_delivered"] == str(len(answer.token_ids))
        for number, other in enumerate(await asyncio.gather(*innocent)):
            prompt = [3 + byte for byte in f"i{number}".encode()]
            assert other.error is None
            assert other.token_ids == [letters(prompt, index) for index in range(400)]
        assert sum(not decode.alive for decode in suite.decodes) == 2

    async def test_it_is_refused_the_next_time_whatever_its_seed(self, make_suite: MakeSuite) -> None:
        suite = await make_suite(3, 1)
        for prefill in suite.prefills:
            prefill.token = deadly(prefill, at=0)
        first = await suite.generate(text="poison", sampling={"seed": 1})
        assert first.error is not None and first.error.reason is Reason.REQUEST_QUARANTINED
        again = await suite.generate(text="poison", sampling={"seed": 2})
        assert again.error is not None and again.error.reason is Reason.REQUEST_QUARANTINED
        assert sum(len(prefill.requests) for prefill in suite.prefills) == 2
        assert (await suite.generate(text="hello", stopping={"max_tokens": 10})).token_ids == expected(10)


def deadly(worker: FakePrefill | FakeDecode, at: int, word: Reason = Reason.ENGINE_FAILED) -> Any:
    """Kills the worker when token `at` or a later one of the poisonous prompt is drawn; `word` is the last that is heard of it."""
    kills: list[asyncio.Task[None]] = []

    def token(prompt: Sequence[int], index: int) -> int:
        if bytes(token_id - 3 for token_id in prompt) == b"poison" and index >= at:
            kills.append(asyncio.get_running_loop().create_task(worker.kill()))
            raise TandemError(word, "the process is gone")
        return letters(prompt, index)

    return token


class CrashLoop:
    """A decode worker that dies of whatever it is asked to decode, and is started again at once, for ever."""

    def __init__(self, worker: FakeDecode) -> None:
        self.num_deaths = 0
        self._digest, self._port = worker.model_digest, int(worker.address.rpartition(":")[2])
        self._worker = worker
        self._dying = asyncio.Event()
        worker.token = self._token
        self.task = asyncio.create_task(self._run())

    def _token(self, prompt: Sequence[int], index: int) -> int:
        self._dying.set()
        raise TandemError(Reason.ENGINE_FAILED, "the process is gone")

    async def _run(self) -> None:
        try:
            while True:
                await self._dying.wait()
                await self._worker.kill()
                self.num_deaths += 1
                self._dying.clear()
                self._worker = FakeDecode(self._digest, self._token)
                await self._worker.start(self._port)
        finally:
            await self._worker.kill()


async def test_a_crash_loop_is_left_alone_and_harms_no_request(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    loop = CrashLoop(suite.decodes[0])
    for number in range(40):
        several = (suite.generate(text=f"{number} {each}", stopping={"max_tokens": 5}) for each in range(5))
        assert [answer.error for answer in await asyncio.gather(*several)] == [None] * 5
    assert 2 <= loop.num_deaths < 10
    assert suite.gateway.counts().num_ejections > 0
    loop.task.cancel()
    await asyncio.gather(loop.task, return_exceptions=True)

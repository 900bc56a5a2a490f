"""Prefill and decode workers together over real gRPC and real transports, with the fake model that reads its memory from KV."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from tandem.api.v1 import generation_pb2
from tandem.errors import Reason, from_rpc_error
from tandem.worker.v1 import prefill_pb2
from tandem.worker.v1.prefill_pb2_grpc import PrefillServiceStub as PrefillStub
from tests.fakes.runner import completion
from tests.service.workers.harness import (
    Pair,
    decode_request,
    generate,
    held,
    node,
    open_decode,
    open_prefill,
    pair,
    prefill_request,
)

PROMPT = [(7 * index + 3) % 251 for index in range(41)]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("token_budget", [4, 7, 512])
async def test_tokens_are_those_of_an_unsplit_run(transport: str, token_budget: int) -> None:
    async with pair(transport, token_budget=token_budget) as nodes:
        tokens, finished = await generate(nodes, prefill_request(PROMPT, max_tokens=9))
        assert tokens == completion(PROMPT, 9)
        assert finished.reason == generation_pb2.FINISH_REASON_LENGTH
        await nodes.prefill.wait_idle()
        await nodes.decode.wait_idle()


async def test_many_requests_at_once_do_not_mix() -> None:
    prompts = [[(index * 31 + position) % 251 for position in range(1 + 5 * index)] for index in range(12)]
    async with pair("shm", num_blocks=160, token_budget=16) as nodes:
        answers = await asyncio.gather(*(generate(nodes, prefill_request(prompt)) for prompt in prompts))
        assert [tokens for tokens, _ in answers] == [completion(prompt, 8) for prompt in prompts]
        await nodes.prefill.wait_idle()
        await nodes.decode.wait_idle()


async def test_the_prefix_cache_is_used_and_seen_and_changes_nothing() -> None:
    async with pair() as nodes:
        first, _ = await generate(nodes, prefill_request(PROMPT))
        call = open_prefill(nodes.prefill, prefill_request(PROMPT))
        assert (await call.read()).admitted.cached_tokens == 40
        call.cancel()
        again, _ = await generate(nodes, prefill_request(PROMPT))
        assert first == again == completion(PROMPT, 8)


async def test_an_end_token_ends_the_completion_wherever_it_is_drawn() -> None:
    expected = completion(PROMPT, 8)
    async with pair() as nodes:
        for position in (0, 1, 5):
            rule = prefill_pb2.StopRule(max_tokens=8, end_token_ids=[expected[position]])
            tokens, finished = await generate(nodes, prefill_request(PROMPT, stop_rule=rule))
            assert tokens == expected[: expected.index(expected[position]) + 1]
            assert finished.reason == generation_pb2.FINISH_REASON_STOP


async def test_min_tokens_keeps_an_end_token_from_being_drawn() -> None:
    async with pair() as nodes:
        end = completion(PROMPT, 1)
        rule = prefill_pb2.StopRule(max_tokens=4, min_tokens=4, end_token_ids=end)
        tokens, _ = await generate(nodes, prefill_request(PROMPT, stop_rule=rule))
        assert len(tokens) == 4
        assert end[0] not in tokens


async def test_a_resumed_request_continues_as_if_never_interrupted() -> None:
    expected = completion(PROMPT, 10)
    async with pair() as nodes:
        request = prefill_request(PROMPT + expected[:4], 10, num_prompt_tokens=len(PROMPT), attempt=2)
        tokens, _ = await generate(nodes, request)
        assert tokens == expected[4:]


async def test_prompt_logprobs_cover_every_token_after_the_first_whatever_the_chunks() -> None:
    async with pair(token_budget=8) as nodes:
        for _ in range(2):
            call = open_prefill(nodes.prefill, prefill_request(PROMPT, prompt_logprobs=2, first_token_only=True))
            events = [event async for event in call]
            assert not events[0].admitted.HasField("ticket")
            assert events[0].admitted.cached_tokens == 0
            scored = events[1].first_token.prompt_logprobs
            assert [token.token_id for token in scored] == PROMPT[1:]
            assert all(len(token.top) == 2 for token in scored)
        await nodes.prefill.wait_idle()


async def test_preempted_sequences_finish_with_the_same_tokens() -> None:
    prompts = [[index, *PROMPT[:9]] for index in range(4)]
    async with node("prefill") as prefill, node("decode", num_blocks=13) as decode:
        nodes = Pair(prefill, decode)
        with held(decode):
            answering = [asyncio.create_task(generate(nodes, prefill_request(prompt, max_tokens=20))) for prompt in prompts]
            await decode.until(lambda load: load.num_waiting + load.num_active == 4)
        answers = await asyncio.gather(*answering)
        assert [tokens for tokens, _ in answers] == [completion(prompt, 20) for prompt in prompts]
        assert sum(finished.num_preemptions for _, finished in answers) > 0
        await decode.wait_idle()


async def test_decode_refuses_before_anything_is_pulled() -> None:
    async with node("prefill") as prefill, node("decode", num_blocks=9) as decode:
        decode.allocator.allocate(6)
        request = prefill_request(PROMPT[:14], max_tokens=20)
        with held(prefill) as entered:
            call = open_prefill(prefill, request)
            admitted = (await call.read()).admitted
            await entered()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await open_decode(decode, decode_request(admitted, request)).read()
            error = from_rpc_error(caught.value)
            assert (error.reason, caught.value.code()) == (Reason.KV_BLOCKS_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            call.cancel()
            await prefill.until(lambda load: load.num_running == 0)
        await prefill.wait_idle()


async def test_another_model_is_refused() -> None:
    async with pair() as nodes:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await open_prefill(nodes.prefill, prefill_request(PROMPT, model_digest="other")).read()
        assert from_rpc_error(caught.value).reason is Reason.MODEL_MISMATCH


Cancel = Callable[[Pair], Awaitable[None]]


async def _cancel_before_admission(nodes: Pair) -> None:
    """The first request takes the whole pool, so the second waits for blocks."""
    with held(nodes.prefill) as entered:
        big = open_prefill(nodes.prefill, prefill_request(list(range(250))))
        assert (await big.read()).HasField("admitted")
        await entered()
        waiting = open_prefill(nodes.prefill, prefill_request(PROMPT))
        reading = asyncio.create_task(waiting.read())
        await nodes.prefill.until(lambda load: load.num_waiting == 1)
        waiting.cancel()
        await nodes.prefill.until(lambda load: load.num_waiting == 0)
        big.cancel()
        await nodes.prefill.until(lambda load: load.num_running == 0)
    await asyncio.gather(reading, return_exceptions=True)


async def _cancel_in_a_chunk(nodes: Pair) -> None:
    with held(nodes.prefill) as entered:
        call = open_prefill(nodes.prefill, prefill_request(PROMPT))
        await call.read()
        await entered()
        call.cancel()
        await nodes.prefill.until(lambda load: load.num_running == 0)
        assert not nodes.prefill.idle, "the step in flight still writes to its blocks"


async def _cancel_while_pulling(nodes: Pair) -> None:
    request = prefill_request(PROMPT)
    with held(nodes.prefill) as entered:
        prefill = open_prefill(nodes.prefill, request)
        decode = open_decode(nodes.decode, decode_request((await prefill.read()).admitted, request))
        assert (await decode.read()).HasField("reserved")
        await entered()
        decode.cancel()
        prefill.cancel()
        await nodes.prefill.until(lambda load: load.num_running == 0)


async def _cancel_in_decode(nodes: Pair) -> None:
    request = prefill_request(PROMPT, max_tokens=200)
    prefill = open_prefill(nodes.prefill, request)
    decode = open_decode(nodes.decode, decode_request((await prefill.read()).admitted, request))
    async for event in decode:
        if event.HasField("delta"):
            break
    decode.cancel()


async def _cancel_with_the_last_token_unread(nodes: Pair) -> None:
    request = prefill_request(PROMPT, max_tokens=3)
    prefill = open_prefill(nodes.prefill, request)
    admitted = (await prefill.read()).admitted
    with held(nodes.decode) as entered:
        decode = open_decode(nodes.decode, decode_request(admitted, request))
        await decode.read()
        await entered()
    await nodes.decode.until(lambda load: load.num_active == 0)
    decode.cancel()


CANCELS = [
    _cancel_before_admission,
    _cancel_in_a_chunk,
    _cancel_while_pulling,
    _cancel_in_decode,
    _cancel_with_the_last_token_unread,
]


@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_cancel_frees_every_block_within_half_a_second(cancel: Cancel, transport: str) -> None:
    async with pair(transport) as nodes:
        await cancel(nodes)
        await nodes.prefill.wait_idle()
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)


async def test_a_cancelled_prompt_is_computed_no_further_than_the_chunk_in_flight() -> None:
    async with pair(token_budget=8) as nodes:
        with held(nodes.prefill, after=2) as entered:
            call = open_prefill(nodes.prefill, prefill_request(PROMPT))
            await call.read()
            await entered()
            call.cancel()
            await nodes.prefill.until(lambda load: load.num_running == 0)
        await nodes.prefill.wait_idle()
        assert nodes.prefill.runner.sizes == [[8]] * 3
        counts = nodes.prefill.worker._server.counts_of("/tandem.worker.v1.PrefillService/Prefill")
        assert (counts.received, counts.cancelled) == (1, 1)


async def test_a_cancelled_sequence_is_decoded_no_further_than_the_step_in_flight() -> None:
    async with pair() as nodes:
        request = prefill_request(PROMPT, max_tokens=200)
        prefill = open_prefill(nodes.prefill, request)
        admitted = (await prefill.read()).admitted
        with held(nodes.decode, after=2) as entered:
            decode = open_decode(nodes.decode, decode_request(admitted, request))
            await decode.read()
            await entered()
            decode.cancel()
            await nodes.decode.until(lambda load: load.num_active == 0)
        await nodes.decode.wait_idle()
        assert nodes.decode.runner.sizes == [[1]] * 3
        counts = nodes.decode.worker._server.counts_of("/tandem.worker.v1.DecodeService/Decode")
        assert (counts.received, counts.cancelled) == (1, 1)


async def test_a_broken_engine_fails_its_requests_and_ends_the_process() -> None:
    def explode() -> None:
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        async with node("prefill") as prefill:
            prefill.runner.gate = explode
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [event async for event in open_prefill(prefill, prefill_request(PROMPT))]
            assert from_rpc_error(caught.value).reason is Reason.ENGINE_FAILED


async def test_an_attempt_is_executed_once_also_after_its_call_while_its_ticket_lives() -> None:
    async with pair() as nodes:
        request = prefill_request(PROMPT)
        with held(nodes.prefill):
            prefill = open_prefill(nodes.prefill, request)
            admitted = (await prefill.read()).admitted
            assert await _refusal(open_prefill(nodes.prefill, request)) is Reason.ALREADY_EXISTS
        await _drained(prefill)
        assert await _refusal(open_prefill(nodes.prefill, request)) is Reason.ALREADY_EXISTS
        with held(nodes.decode):
            decode = open_decode(nodes.decode, decode_request(admitted, request))
            await decode.read()
            assert await _refusal(open_decode(nodes.decode, decode_request(admitted, request))) is Reason.ALREADY_EXISTS
        await _drained(decode)
        await nodes.prefill.wait_idle()
        assert sum(map(sum, nodes.prefill.runner.sizes)) == len(PROMPT)
        assert (await generate(nodes, request))[0] == completion(PROMPT, 8)


async def test_nothing_begins_after_its_deadline() -> None:
    async with pair() as nodes:
        with held(nodes.prefill):
            call = PrefillStub(nodes.prefill.channel).Prefill(prefill_request(PROMPT), timeout=0.05)
            assert await _refusal(call) is Reason.DEADLINE_EXCEEDED
            await nodes.prefill.until(lambda load: load.num_running == 0)
        await nodes.prefill.wait_idle()
        computed = len(nodes.prefill.runner.sizes)
        with held(nodes.prefill):
            big = open_prefill(nodes.prefill, prefill_request(list(range(250))))
            await big.read()
            waiting = PrefillStub(nodes.prefill.channel).Prefill(prefill_request(PROMPT), timeout=0.05)
            assert await _refusal(waiting) is Reason.DEADLINE_EXCEEDED
            await nodes.prefill.until(lambda load: load.num_waiting == 0)
            big.cancel()
            await nodes.prefill.until(lambda load: load.num_running == 0)
        await nodes.prefill.wait_idle()
        assert len(nodes.prefill.runner.sizes) == computed + 1


async def _drained(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _refusal(call: grpc.aio.UnaryStreamCall) -> Reason:
    """The error that ends a call, whatever came before."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drained(call)
    return from_rpc_error(caught.value).reason

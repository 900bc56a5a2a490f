"""Pools that are full, and memory that is not there: work goes on, and whoever is refused is told so alone."""

import asyncio
from collections import Counter

import grpc
import pytest

from tandem.errors import Reason, from_rpc_error
from tandem.worker.v1 import prefill_pb2
from tandem.worker_settings import TransferSettings
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

PROMPT = [(17 * index + 9) % 251 for index in range(30)]


async def served_in_the_end(nodes: Pair, request: prefill_pb2.PrefillRequest, refusals: Counter[Reason]) -> list[int]:
    """Tries again after each refusal, as the gateway does: the ticket is given up, another attempt begins."""
    while True:
        try:
            return (await generate(nodes, request))[0]
        except grpc.aio.AioRpcError as raised:
            error = from_rpc_error(raised)
            assert error.reason is Reason.TICKET_NOT_FOUND or error.retry_after_s is not None, error
            refusals[error.reason] += 1
        request.attempt += 1
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_b5_twice_as_much_as_a_tiny_decode_pool_holds_is_served_without_a_deadlock(transport: str) -> None:
    """Each request needs 8 blocks at first and 13 in the end; the pools hold 26 and 24."""
    prompts = [[number, *PROMPT[1:]] for number in range(16)]
    refusals: Counter[Reason] = Counter()
    transfer = TransferSettings(transports=(transport,), lease_s=1.0)
    async with node("prefill", 24, transfer=transfer) as prefill, node("decode", 26, transfer=transfer) as decode:
        nodes = Pair(prefill, decode)
        requests = [prefill_request(prompt, max_tokens=20) for prompt in prompts]
        async with asyncio.timeout(40):
            answers = await asyncio.gather(*(served_in_the_end(nodes, request, refusals) for request in requests))
        assert answers == [completion(prompt, 20) for prompt in prompts]
        assert refusals[Reason.KV_BLOCKS_EXHAUSTED] > 0, "the load was there"
        assert set(refusals) <= {Reason.KV_BLOCKS_EXHAUSTED, Reason.TICKET_NOT_FOUND}, refusals
        await decode.wait_idle()
        await prefill.wait_idle(limit_s=5.0)


async def test_a_refused_ticket_costs_prefill_no_more_than_the_step_in_flight() -> None:
    """Decode refuses before the prompt is computed."""
    async with node("prefill", token_budget=4) as prefill, node("decode", num_blocks=12) as decode:
        decode.allocator.allocate(10)
        request = prefill_request(PROMPT, max_tokens=4)
        prefill.runner.gate = lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(0.02), prefill.worker._loop).result()
        call = open_prefill(prefill, request)
        admitted = (await call.read()).admitted
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await open_decode(decode, decode_request(admitted, request)).read()
        assert from_rpc_error(caught.value).reason is Reason.KV_BLOCKS_EXHAUSTED
        call.cancel()
        await prefill.wait_idle()
        assert sum(map(sum, prefill.runner.sizes)) < len(PROMPT)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_b7_without_memory_to_take_blocks_in_a_request_fails_alone(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(transport) as nodes:
        blocks = nodes.decode.worker._puller._blocks

        def exhausted(*_: object) -> list[int]:
            raise MemoryError

        with held(nodes.decode) as entered:
            healthy = asyncio.create_task(generate(nodes, prefill_request(PROMPT[::-1], max_tokens=20)))
            await entered()
            with monkeypatch.context() as patch:
                for name in ("checksums", "fetch"):
                    patch.setattr(blocks, name, exhausted)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(nodes, prefill_request(PROMPT))
        assert from_rpc_error(caught.value).reason is Reason.KV_BLOCKS_EXHAUSTED
        assert (await healthy)[0] == completion(PROMPT[::-1], 20)
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)

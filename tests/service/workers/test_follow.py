"""Tokens of many requests in one call: the same tokens, and nothing that outlives the call."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from tandem.errors import Reason, from_rpc_error
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc
from tests.fakes.runner import completion
from tests.service.workers.harness import Node, Pair, decode_request, held, open_decode, open_prefill, pair, prefill_request


class Followed:
    """A Follow call, and the tokens that came in it by stream number."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self.call = call
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.num_messages = self.num_deltas = 0
        self._more = asyncio.Event()

    async def read(self) -> None:
        while (response := await self.call.read()) is not grpc.aio.EOF:
            self.num_messages += 1
            for each in response.deltas:
                self.num_deltas += 1
                self._add(each.stream_number, each.delta.index, [token.token_id for token in each.delta.tokens])
            plain = response.plain_tokens
            for number, index, token_id in zip(plain.stream_numbers, plain.indexes, plain.token_ids, strict=True):
                self._add(number, index, [token_id])
            self._more.set()

    def _add(self, stream_number: int, index: int, tokens: list[int]) -> None:
        assert index == len(self.tokens[stream_number]) + 1
        self.tokens[stream_number] += tokens

    async def until(self, stream_number: int, num_tokens: int) -> None:
        async with asyncio.timeout(5):
            while len(self.tokens[stream_number]) < num_tokens:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def followed(at: Node, follower_id: str = "me", plain_tokens: bool = True) -> AsyncIterator[Followed]:
    request = decode_pb2.FollowRequest(follower_id=follower_id, plain_tokens=plain_tokens)
    call = decode_pb2_grpc.DecodeServiceStub(at.channel).Follow(request)
    following = Followed(call)
    assert not (await call.read()).deltas
    reading = asyncio.create_task(following.read())
    try:
        yield following
    finally:
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def decode(
    nodes: Pair, prompt: Sequence[int], number: int, follower_id: str = "me", logprobs: int | None = None
) -> list[decode_pb2.DecodeResponse]:
    """The events of a Decode call whose deltas are to come elsewhere."""
    request = prefill_request(prompt)
    if logprobs is not None:
        request.logprobs = logprobs
    prefill = open_prefill(nodes.prefill, request)
    asked = decode_request((await prefill.read()).admitted, request)
    asked.follower_id, asked.stream_number = follower_id, number
    call = open_decode(nodes.decode, asked)
    while await prefill.read() is not grpc.aio.EOF:
        pass
    return [event async for event in call]


@pytest.mark.parametrize("plain_tokens", [True, False])
async def test_tokens_of_all_requests_come_in_the_follow_call(plain_tokens: bool) -> None:
    prompts = [[(index * 31 + position) % 251 for position in range(1 + 5 * index)] for index in range(6)]
    async with pair("shm", num_blocks=160) as nodes, followed(nodes.decode, plain_tokens=plain_tokens) as following:
        answers = await asyncio.gather(*(decode(nodes, prompt, number) for number, prompt in enumerate(prompts)))
        for number, (prompt, events) in enumerate(zip(prompts, answers, strict=True)):
            assert [event.WhichOneof("event") for event in events] == ["reserved", "kv_ready", "finished"]
            assert events[-1].finished.num_tokens == 8
            await following.until(number, 7)
            assert following.tokens[number] == completion(prompt, 8)[1:]
        await nodes.decode.wait_idle()
    assert bool(following.num_deltas) != plain_tokens


async def test_tokens_with_log_probabilities_come_as_deltas() -> None:
    async with pair("shm") as nodes, followed(nodes.decode) as following:
        await asyncio.gather(decode(nodes, [1, 2, 3], 0, logprobs=1), decode(nodes, [4, 5, 6], 1))
        await following.until(0, 7)
        await following.until(1, 7)
    assert following.num_deltas == 7
    assert following.tokens[0] == completion([1, 2, 3], 8)[1:]


async def test_tokens_of_one_step_come_in_one_message() -> None:
    async with pair("shm", num_blocks=160) as nodes, followed(nodes.decode) as following:
        with held(nodes.decode) as begun:
            first = asyncio.create_task(decode(nodes, [1, 2, 3], 0))
            await begun()
            others = [asyncio.create_task(decode(nodes, [number, 2, 3], number)) for number in range(1, 8)]
            await nodes.decode.until(lambda load: load.num_active + load.num_waiting == 8)
        await asyncio.gather(first, *others)
        await following.until(7, 7)
    assert following.num_messages < 8 * 7 / 2


@pytest.mark.parametrize("follower_id", ["", "nobody"])
async def test_without_such_a_call_deltas_come_as_ever(follower_id: str) -> None:
    async with pair("shm") as nodes:
        events = await decode(nodes, [1, 2, 3], 0, follower_id)
    tokens = [token.token_id for event in events for token in event.delta.tokens]
    assert tokens == completion([1, 2, 3], 8)[1:]


async def test_a_request_fails_when_the_call_that_carries_its_tokens_ends() -> None:
    async with pair("shm") as nodes:
        with held(nodes.decode) as begun:
            async with followed(nodes.decode):
                running = asyncio.create_task(decode(nodes, [1, 2, 3], 0))
                await begun()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running
        assert from_rpc_error(raised.value).reason is Reason.STREAM_BROKEN
        await nodes.decode.wait_idle()


async def test_a_follower_needs_a_name_of_its_own() -> None:
    async with pair("shm") as nodes, followed(nodes.decode):
        stub = decode_pb2_grpc.DecodeServiceStub(nodes.decode.channel)
        for name in ("", "me"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Follow(decode_pb2.FollowRequest(follower_id=name)).read()
            assert from_rpc_error(raised.value).reason is Reason.INVALID_REQUEST


async def test_a_follower_is_forgotten_with_its_call() -> None:
    async with pair("shm") as nodes:
        async with followed(nodes.decode):
            pass
        async with asyncio.timeout(5):
            while nodes.decode.worker._decode._followers:  # type: ignore[union-attr]  # noqa: ASYNC110
                await asyncio.sleep(0.002)


async def test_a_worker_that_is_followed_can_leave() -> None:
    async with pair("shm") as nodes, followed(nodes.decode) as following:
        nodes.decode.worker.stop()
        async with asyncio.timeout(5):
            assert await following.call.code() is grpc.StatusCode.UNAVAILABLE

"""Real workers of both kinds in one process, on loopback, with the fake model; and a client that plays the gateway's part."""

import asyncio
import contextlib
import itertools
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from decode_svc.settings import DecodeSettings
from decode_svc.worker import DecodeWorker
from llm.kv.allocator import BlockAllocator
from llm.kv.pool import KvPool
from llm.startup import LoadedModel
from prefill_svc.settings import PrefillSettings
from prefill_svc.worker import PrefillWorker
from tandem.addresses import free_port
from tandem.api.v1 import generation_pb2
from tandem.channels import open_channel
from tandem.models import ModelFiles
from tandem.server import ServerSettings
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tandem.worker_settings import TransferSettings
from tests.fakes.runner import LAYOUT, FakeRunner

FILES = ModelFiles("fake", "random", None, "model-digest", "tokenizer-digest", {})


@dataclass
class Node:
    """One worker in this process."""

    worker: PrefillWorker | DecodeWorker
    runner: FakeRunner
    allocator: BlockAllocator
    channel: grpc.aio.Channel

    @property
    def idle(self) -> bool:
        return self.allocator.num_free == self.allocator.num_blocks

    async def wait_idle(self, limit_s: float = 0.5) -> None:
        """Every block is free within the promised time."""
        async with asyncio.timeout(limit_s):
            while not self.idle:  # noqa: ASYNC110 - counters of another thread
                await asyncio.sleep(0.002)
        self.allocator.check_integrity()

    async def until(self, holds: Callable[[Any], bool], limit_s: float = 5.0) -> None:
        """Returns once the engine's load is such."""
        async with asyncio.timeout(limit_s):
            while not holds(self.worker._engine.load()):  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@contextlib.contextmanager
def held(at: Node, after: int = 0) -> Iterator[Callable[[], Awaitable[object]]]:
    """Holds the engine in its next step, or one `after` so many, until the block ends; what it yields waits for its begin."""
    entered, leave, steps = threading.Event(), threading.Event(), itertools.count()

    def hold() -> None:
        if next(steps) < after:
            return
        entered.set()
        leave.wait(10)

    at.runner.gate = hold
    try:
        yield lambda: asyncio.to_thread(entered.wait, 10)
    finally:
        at.runner.gate = lambda: None
        leave.set()


@dataclass
class Pair:
    """A prefill and a decode worker."""

    prefill: Node
    decode: Node


@contextlib.asynccontextmanager
async def node(kind: str, num_blocks: int = 64, grace_s: float = 1.0, **settings: object) -> AsyncIterator[Node]:
    """A running worker of a kind, "prefill" or "decode"."""
    pool = KvPool.create(LAYOUT, num_blocks)
    runner = FakeRunner(pool)
    allocator = BlockAllocator(num_blocks, LAYOUT.block_tokens, kind == "prefill", pool.generations.bump)
    loaded = LoadedModel(runner, pool, allocator, LAYOUT)  # type: ignore[arg-type]
    server = ServerSettings(port=free_port("127.0.0.1"), grace_s=grace_s)
    if kind == "prefill":
        worker: PrefillWorker | DecodeWorker = PrefillWorker(PrefillSettings(server=server, **settings), FILES, loaded)  # type: ignore[arg-type]
    else:
        worker = DecodeWorker(DecodeSettings(server=server, **settings), FILES, loaded)  # type: ignore[arg-type]
    address = await worker.start()
    ending = asyncio.create_task(worker.run_until_stopped())
    try:
        async with open_channel(address) as channel:
            yield Node(worker, runner, allocator, channel)
    finally:
        worker.stop()
        await ending


@contextlib.asynccontextmanager
async def pair(transport: str = "tcp", num_blocks: int = 64, **settings: object) -> AsyncIterator[Pair]:
    """Both kinds; further settings are the prefill worker's."""
    transfer = TransferSettings(transports=(transport,), lease_s=30.0)
    async with (
        node("prefill", num_blocks, transfer=transfer, **settings) as prefill,
        node("decode", num_blocks, transfer=transfer) as decode,
    ):
        yield Pair(prefill, decode)


def sampling(**fields: float) -> generation_pb2.SamplingParams:
    """Greedy, unless told otherwise, with every field set."""
    values = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 1,
    }
    return generation_pb2.SamplingParams(**{**values, **fields})


def prefill_request(prompt: Sequence[int], max_tokens: int = 8, **fields: object) -> prefill_pb2.PrefillRequest:
    values: dict[str, object] = {
        "request_id": uuid.uuid4().hex,
        "attempt": 1,
        "model_digest": FILES.digest,
        "token_ids": prompt,
        "num_prompt_tokens": len(prompt),
        "sampling": sampling(),
        "stop_rule": prefill_pb2.StopRule(max_tokens=max_tokens),
    }
    return prefill_pb2.PrefillRequest(**{**values, **fields})


def decode_request(admitted: prefill_pb2.Admitted, request: prefill_pb2.PrefillRequest) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        ticket=admitted.ticket,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=request.sampling,
        stop_rule=request.stop_rule,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
    )


def open_prefill(at: Node, request: prefill_pb2.PrefillRequest) -> grpc.aio.UnaryStreamCall:
    return prefill_pb2_grpc.PrefillServiceStub(at.channel).Prefill(request, timeout=20)


def open_decode(at: Node, request: decode_pb2.DecodeRequest) -> grpc.aio.UnaryStreamCall:
    return decode_pb2_grpc.DecodeServiceStub(at.channel).Decode(request, timeout=20)


async def generate(nodes: Pair, request: prefill_pb2.PrefillRequest) -> tuple[list[int], decode_pb2.DecodeFinished]:
    """The whole request as the gateway would run it: tokens and the last message."""
    prefill = open_prefill(nodes.prefill, request)
    first = await prefill.read()
    if request.attempt > 1:
        assert first.HasField("taken")
        first = await prefill.read()
    decode = open_decode(nodes.decode, decode_request(first.admitted, request))
    tokens = [event.first_token.token.token_id async for event in _rest(prefill) if event.HasField("first_token")]
    async for event in _rest(decode):
        if event.HasField("delta"):
            assert event.delta.index + len(request.token_ids) - request.num_prompt_tokens >= 0
            assert event.delta.index == len(tokens) + len(request.token_ids) - request.num_prompt_tokens
            tokens += [token.token_id for token in event.delta.tokens]
        if event.HasField("finished"):
            return tokens, event.finished
    raise AssertionError("the decode stream ended without its last message")


async def _rest(call: grpc.aio.UnaryStreamCall) -> AsyncIterator[object]:
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event

"""One measured request, and many of them under a load, through the gateway's gRPC."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from tandem.api.v1 import generation_pb2, generation_pb2_grpc


@dataclass(frozen=True)
class Shape:
    """A closed loop: `streams` clients, each sending its next request when the last has ended."""

    prompt_tokens: int
    completion_tokens: int
    streams: int

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}/{self.completion_tokens}, {self.streams}"


@dataclass(frozen=True)
class Record:
    """One request as its client saw it. Moments are seconds of the client's monotonic clock; `arrivals` has one per token."""

    sent: float
    arrivals: Sequence[float]
    timings: generation_pb2.Timings
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def tpot_s(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, len(self.arrivals) - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def request_of(shape: Shape, vocabulary_size: int, chance: random.Random) -> generation_pb2.GenerateRequest:
    """Random tokens, so that no two prompts share a prefix; greedy; exactly `completion_tokens` tokens."""
    ids = [chance.randrange(100, vocabulary_size) for _ in range(shape.prompt_tokens)]
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=ids),
        sampling=generation_pb2.SamplingParams(temperature=0),
        stopping=generation_pb2.StoppingParams(max_tokens=shape.completion_tokens, ignore_eos=True),
    )


async def measure(stub: generation_pb2_grpc.GenerationServiceStub, request: generation_pb2.GenerateRequest) -> Record:
    """Sends one request and notes when each token arrives."""
    sent, arrivals, finished = time.perf_counter(), [], None
    async for response in stub.Generate(request, timeout=600):
        arrivals += [time.perf_counter()] * len(response.delta.token_ids)
        if response.HasField("finished"):
            finished = response.finished
    assert finished is not None, "the stream ended without its last message"
    assert len(arrivals) == request.stopping.max_tokens, (
        f"{len(arrivals)} tokens came, {request.stopping.max_tokens} were asked for"
    )
    return Record(sent, arrivals, finished.timings, finished.usage.cached_prompt_tokens)


async def run_shape(channel: grpc.aio.Channel, shape: Shape, num_requests: int, vocabulary_size: int, seed: int) -> list[Record]:
    """`num_requests` requests in all, over `shape.streams` clients."""
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    chance = random.Random(seed)
    requests = [request_of(shape, vocabulary_size, chance) for _ in range(num_requests)]
    records: list[Record] = []

    async def client() -> None:
        while requests:
            records.append(await measure(stub, requests.pop()))

    async with asyncio.TaskGroup() as group:
        for _ in range(shape.streams):
            group.create_task(client())
    return records

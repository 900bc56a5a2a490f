"""What 256 gRPC streams on a worker's event loop cost the engine thread of the same process.

`python -m bench.engine_isolation [--streams 256] [--step-ms 8] [--host-ms 1] [--json out.json]`: the real decode service and
engine, over a fake device whose step takes a fixed time without the GIL; the host's part of a launch holds the GIL for `--host-ms`,
as laying out and launching do. Measured is the time from landing to landing: while nobody reads, while a client in a process of its
own reads all tokens in one `Follow` call, as gateways do, and while it reads them in a call a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.options import new_parser
from decode_svc.batcher import BatcherLimits, DecodeBatcher, SequenceState
from decode_svc.engine import DecodeEngine
from decode_svc.job import DecodeJob, StopRule
from decode_svc.service import DecodeServicer
from kvtransfer.puller import PullResult
from llm.kv.allocator import BlockAllocator
from llm.sampling_params import SamplingParams
from tandem.api.v1 import generation_pb2
from tandem.engine_thread import Courier
from tandem.interceptor import Interceptor
from tandem.server import loop_factory
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2
from tandem.worker_requests import ModelLimits

_BLOCK_TOKENS, _PROMPT_TOKENS = 16, 1024
_LAYOUT = kv_pb2.KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=_BLOCK_TOKENS, dtype=kv_pb2.KV_DTYPE_FLOAT32, tensor_parallel_size=1
)
_GREEDY = generation_pb2.SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=0,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Medians and 99th percentiles of the time between landings, in milliseconds. `cost`: by how much the median is longer."""

    name: str
    p50_ms: float
    p99_ms: float
    steps: int
    cost: float


class FakeDevice:
    """Stands for GpuModelRunner: steps follow each other on one device and take `step_s` each."""

    def __init__(self, step_s: float, host_s: float, num_steps: int) -> None:
        self._step_s, self._host_s, self._num_steps = step_s, host_s, num_steps
        self._free_at = 0.0
        self.landings: list[float] = []
        self.ended = threading.Event()

    def land(self) -> None:
        self.landings.append(time.perf_counter())
        if len(self.landings) >= self._num_steps:
            self.ended.set()

    def adopt_thread(self) -> None:
        """Nothing to take over."""

    def forward(self, slices: Sequence[Any]) -> Any:
        raise AssertionError("all rows are drawn on the device")

    def start_step(self, slices: Sequence[Any], sources: Sequence[int], rows: Sequence[Any], after: Sequence[Any] = ()) -> FakeStep:
        until = time.thread_time() + self._host_s
        while time.thread_time() < until:
            pass
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        return FakeStep(self, self._free_at, len(rows))


class FakeStep:
    def __init__(self, device: FakeDevice, ends_at: float, count: int) -> None:
        self._device, self._ends_at, self._count = device, ends_at, count

    def wait_filled(self) -> None:
        time.sleep(max(0.0, self._ends_at - time.perf_counter()))

    def token_ids(self) -> list[int]:
        time.sleep(max(0.0, self._ends_at - time.perf_counter()))
        self._device.land()
        return [7] * self._count


class Pulls:
    """Stands for KvPuller: blocks are there as soon as all streams are, so that they begin together."""

    def __init__(self, num_streams: int) -> None:
        self._all_here = asyncio.Barrier(num_streams)

    def check(self, ticket: Any) -> None:
        """Every ticket will do."""

    async def pull(self, ticket: Any, block_ids: Sequence[int], recipient: Any) -> PullResult:
        await self._all_here.wait()
        return PullResult(first_token_id=3, transport="tcp", num_bytes=0, pull_us=0, num_refetched=0)

    async def release(self, ticket: Any) -> None:
        """Nothing to give back."""


class Worker:
    """The engine and the decode service over it."""

    def __init__(self, device: FakeDevice, num_streams: int, num_tokens: int) -> None:
        self.device, self._num_tokens = device, num_tokens
        blocks = num_streams * -(-(_PROMPT_TOKENS + num_tokens) // _BLOCK_TOKENS) + num_streams
        allocator = BlockAllocator(blocks, _BLOCK_TOKENS, prefix_cache=False)
        batcher = DecodeBatcher(allocator, BatcherLimits(num_streams, num_streams))
        courier = Courier(asyncio.get_running_loop())
        self.engine = DecodeEngine(device, allocator, batcher, courier, on_failure=_raise, on_change=lambda: None)  # type: ignore[arg-type]
        limits = ModelLimits(1000, _PROMPT_TOKENS + num_tokens)
        self.servicer = DecodeServicer(self.engine, Pulls(num_streams), limits)  # type: ignore[arg-type]

    def admit(self) -> None:
        """A sequence whose tokens nobody reads."""
        sequence = SequenceState([1] * _PROMPT_TOKENS, _PROMPT_TOKENS + self._num_tokens)
        job = DecodeJob(sequence, _PROMPT_TOKENS, SamplingParams(temperature=0.0), StopRule(frozenset(), 0, self._num_tokens))
        self.engine.reserve(job)
        self.engine.activate(job, 3)


def _raise(error: Exception) -> None:
    raise error


def _request(number: int, num_tokens: int, follower_id: str) -> decode_pb2.DecodeRequest:
    ticket = kv_pb2.KvTicket(
        ticket_id=f"{number:032x}",
        epoch=1,
        producer_id="none",
        model_digest="none",
        layout=_LAYOUT,
        num_tokens=_PROMPT_TOKENS,
        block_ids=range(_PROMPT_TOKENS // _BLOCK_TOKENS),
        lease_ms=5000,
        checksum_algorithm=kv_pb2.CHECKSUM_ALGORITHM_XXH3_64,
        address="none",
    )
    return decode_pb2.DecodeRequest(
        request_id=str(number),
        attempt=1,
        ticket=ticket,
        token_ids=[1] * _PROMPT_TOKENS,
        num_prompt_tokens=_PROMPT_TOKENS,
        sampling=_GREEDY,
        stop_rule=prefill_pb2.StopRule(max_tokens=num_tokens),
        follower_id=follower_id,
        stream_number=number,
    )


def _client(port: int, num_streams: int, num_tokens: int, follow: bool) -> None:
    """Reads all tokens; with `follow` in one call."""

    async def read(stub: decode_pb2_grpc.DecodeServiceStub, number: int, follower_id: str) -> None:
        async for _ in stub.Decode(_request(number, num_tokens, follower_id)):
            pass

    async def main() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
            following = None
            if follow:
                call = stub.Follow(decode_pb2.FollowRequest(follower_id="client", plain_tokens=True))
                await call.read()
                following = asyncio.create_task(_read_all(call))
            await asyncio.gather(*(read(stub, number, "client" if follow else "") for number in range(num_streams)))
            if following is not None:
                following.cancel()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


async def _read_all(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@asynccontextmanager
async def _read_by(worker: Worker, options: argparse.Namespace, follow: bool) -> AsyncIterator[asyncio.Task[None]]:
    """A server for the worker, and a client that reads all of its streams; gives what ends when the client does."""
    server = grpc.aio.server(interceptors=[Interceptor()])
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(worker.servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    arguments = (port, options.streams, options.tokens, follow)
    client = multiprocessing.get_context("spawn").Process(target=_client, args=arguments)
    client.start()
    reading = asyncio.create_task(asyncio.to_thread(client.join))
    try:
        yield reading
        await reading
    finally:
        client.terminate()
        await server.stop(None)


async def measure(options: argparse.Namespace, follow: bool | None) -> Sequence[float]:
    """Milliseconds between landings. `follow`: how tokens are read; None if they are left in the mailboxes."""
    device = FakeDevice(options.step_ms / 1e3, options.host_ms / 1e3, options.tokens - 1)
    worker = Worker(device, options.streams, options.tokens)
    worker.engine.start()
    try:
        if follow is None:
            for _ in range(options.streams):
                worker.admit()
            await asyncio.to_thread(device.ended.wait)
        else:
            async with _read_by(worker, options, follow) as reading:
                await reading
    finally:
        await asyncio.to_thread(worker.engine.stop)
    if not device.ended.is_set():
        raise SystemExit("the client failed; its own messages say why")
    landings = device.landings[len(device.landings) // 4 :]
    return [1e3 * (after - before) for before, after in itertools.pairwise(landings)]


def _figure(name: str, gaps: Sequence[float], alone_ms: float) -> Figure:
    p50_ms = statistics.median(gaps)
    return Figure(name, p50_ms, sorted(gaps)[int(0.99 * (len(gaps) - 1))], len(gaps), p50_ms / alone_ms - 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(
        "engine_isolation", "What the event loop of a decode worker costs its engine thread; the device is a fake one."
    )
    parser.add_argument("--streams", type=int, default=256, help="sequences that decode, and streams")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream, so steps of a run")
    parser.add_argument("--step-ms", type=float, default=8.0, help="a step on the device")
    parser.add_argument("--host-ms", type=float, default=1.0, help="processor time of a launch beside the engine's own")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    figures: list[Figure] = []
    for name, follow in (("nobody reads", None), ("one Follow call", True), ("a call a stream", False)):
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            gaps = runner.run(measure(options, follow))
        figures.append(_figure(name, gaps, figures[0].p50_ms if figures else statistics.median(gaps)))
        item = figures[-1]
        print(f"{name:>16}: {item.p50_ms:.2f} ms a step p50, {item.p99_ms:.2f} p99, {item.steps} steps; costs {item.cost:.1%}")
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in figures], indent=1))


if __name__ == "__main__":
    main()

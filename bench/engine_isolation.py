"""What 256 gRPC streams on a worker's event loop cost the engine thread of the same process.

`python -m bench.engine_isolation [--streams 256] [--step-ms 8] [--host-ms 1] [--json out.json]`: the real decode engine and
mailboxes, over a fake device whose step takes a fixed time without the GIL; the host's part of a launch holds the GIL for
`--host-ms`, as laying out and launching do. Each stream is a gRPC call that gets a message a token, which is what a client without
`Follow` gets, and the worst case. Measured is the time from landing to landing: while nobody reads, and with all streams read by a
client in a process of its own.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from decode_svc.batcher import BatcherLimits, DecodeBatcher, SequenceState
from decode_svc.engine import DecodeEngine
from decode_svc.job import DecodeJob, Drawn, StopRule
from llm.kv.allocator import BlockAllocator
from llm.sampling_params import SamplingParams
from tandem.engine_thread import Courier
from tandem.sampled import sampled_to_proto
from tandem.worker.v1 import decode_pb2

_METHOD = "/tandem.bench.Tokens/Stream"
_BLOCK_TOKENS, _PROMPT_TOKENS = 16, 1024


@dataclass(frozen=True)
class Figure:
    """Medians and 99th percentiles of the time between landings, in milliseconds."""

    name: str
    p50_ms: float
    p99_ms: float
    steps: int


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

    def start_step(self, slices: Sequence[Any], sources: Sequence[int], rows: Sequence[Any]) -> FakeStep:
        until = time.thread_time() + self._host_s
        while time.thread_time() < until:
            pass
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        return FakeStep(self, self._free_at, len(rows))


class FakeStep:
    def __init__(self, device: FakeDevice, ends_at: float, count: int) -> None:
        self._device, self._ends_at, self._count = device, ends_at, count

    def token_ids(self) -> list[int]:
        time.sleep(max(0.0, self._ends_at - time.perf_counter()))
        self._device.land()
        return [7] * self._count


class Worker:
    """The engine, and a gRPC server with one stream a sequence."""

    def __init__(self, device: FakeDevice, num_streams: int, num_tokens: int) -> None:
        self.device, self._num_tokens = device, num_tokens
        blocks = num_streams * -(-(_PROMPT_TOKENS + num_tokens) // _BLOCK_TOKENS) + num_streams
        allocator = BlockAllocator(blocks, _BLOCK_TOKENS, prefix_cache=False)
        batcher = DecodeBatcher(allocator, BatcherLimits(num_streams, num_streams))
        courier = Courier(asyncio.get_running_loop())
        self.engine = DecodeEngine(device, allocator, batcher, courier, on_failure=_raise, on_change=lambda: None)  # type: ignore[arg-type]

    def admit(self) -> DecodeJob:
        sequence = SequenceState([1] * _PROMPT_TOKENS, _PROMPT_TOKENS + self._num_tokens)
        rule = StopRule(frozenset(), 0, self._num_tokens)
        job = DecodeJob(sequence, _PROMPT_TOKENS, SamplingParams(temperature=0.0), rule)
        self.engine.reserve(job)
        return job

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        job = self.admit()
        try:
            self.engine.activate(job, 3)
            while True:
                for event in await job.mailbox.take():
                    if not isinstance(event, Drawn):
                        return
                    delta = decode_pb2.TokenDelta(index=event.index, tokens=[sampled_to_proto(event.token)])
                    await context.write(decode_pb2.DecodeResponse(delta=delta).SerializeToString())
        finally:
            self.engine.close(job)


def _raise(error: Exception) -> None:
    raise error


def _client(port: int, num_streams: int) -> None:
    async def read(channel: grpc.aio.Channel) -> None:
        async for _ in channel.unary_stream(_METHOD)(b""):
            pass

    async def main() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.gather(*(read(channel) for _ in range(num_streams)))

    asyncio.run(main())


async def measure(name: str, options: argparse.Namespace, streams: bool) -> Figure:
    """With `streams` all tokens travel by gRPC; else they are left in the mailboxes."""
    device = FakeDevice(options.step_ms / 1e3, options.host_ms / 1e3, options.tokens - 1)
    worker = Worker(device, options.streams, options.tokens)
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(worker.stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tandem.bench.Tokens", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = None
    if streams:
        client = multiprocessing.get_context("spawn").Process(target=_client, args=(port, options.streams))
        client.start()
    else:
        for _ in range(options.streams):
            worker.engine.activate(worker.admit(), 3)
    worker.engine.start()
    try:
        await asyncio.to_thread(device.ended.wait)
    finally:
        if client is not None:
            await asyncio.to_thread(client.join)
        await server.stop(None)
        await asyncio.to_thread(worker.engine.stop)
    return _figure(name, device.landings[len(device.landings) // 4 :])


def _figure(name: str, landings: Sequence[float]) -> Figure:
    gaps = sorted(1e3 * (after - before) for before, after in itertools.pairwise(landings))
    return Figure(name, statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1))], len(gaps))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the event loop costs the engine thread.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream, so steps of a run")
    parser.add_argument("--step-ms", type=float, default=8.0, help="a step on the device")
    parser.add_argument("--host-ms", type=float, default=1.0, help="processor time of a launch beside the engine's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    figures = [
        asyncio.run(measure("nobody reads", options, streams=False)),
        asyncio.run(measure(f"{options.streams} streams", options, streams=True)),
    ]
    for item in figures:
        print(f"{item.name:>14}: {item.p50_ms:.2f} ms a step p50, {item.p99_ms:.2f} p99, {item.steps} steps")
    cost = figures[1].p50_ms / figures[0].p50_ms - 1
    print(f"the event loop costs the engine {cost:.1%} of a step (p50)")
    if options.json:
        options.json.write_text(json.dumps({"figures": [asdict(item) for item in figures], "cost": cost}, indent=1))


if __name__ == "__main__":
    main()

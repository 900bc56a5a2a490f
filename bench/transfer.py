"""`python -m bench.transfer`: the hand-off alone, from a producer in a child process to a consumer in this one.

Two figures for each transport and size of block: GB/s of a whole prompt that is ready at once, and the hand-off's latency when only
the last chunk is still missing: from the producer's learning that the chunk is computed (`finish`) until the consumer has verified
it all. Both processes read the same clock (CLOCK_MONOTONIC). Prints a table, writes JSON.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.report import percentile
from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.puller import KvPuller
from kvtransfer.service import KvTransferServicer
from kvtransfer.ticket import KvTicket
from llm.kv.layout import KvDtype, KvLayout
from llm.kv.pool import KvPool
from tandem.addresses import free_port
from tandem.channels import open_internal_channel
from tandem.server import Server, ServerSettings, run
from tandem.worker.v1 import kv_pb2_grpc

DIGESTS = ("model", "tokenizer")


@dataclass(frozen=True)
class Case:
    """What is moved. `chunk_tokens` are missing until `finish` in the latency runs."""

    transport: str
    dtype: KvDtype
    prompt_tokens: int
    chunk_tokens: int

    @property
    def layout(self) -> KvLayout:
        """SmolLM2-135M: 30 layers, 3 KV heads of 64."""
        return KvLayout(30, 3, 64, 16, self.dtype)

    @property
    def num_blocks(self) -> int:
        return self.layout.blocks_for(self.prompt_tokens)


@dataclass(frozen=True)
class Figures:
    """Medians and 99th percentiles over the rounds. `whole`: a prompt that is ready at once, from the call of pull."""

    mib: float
    gb_per_second: float
    whole_p50_ms: float
    handoff_p50_ms: float
    handoff_p99_ms: float


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    cases = [
        Case(transport, dtype, arguments.prompt_tokens, arguments.chunk_tokens)
        for transport in arguments.transports
        for dtype in arguments.dtypes
    ]
    rows = {f"{case.transport} {case.dtype}": measure(case, arguments.rounds) for case in cases}
    print_table(rows, f"hand-off of {arguments.prompt_tokens} tokens, the last {arguments.chunk_tokens} of them late")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "transfer.json"
    path.write_text(json.dumps({name: asdict(figures) for name, figures in rows.items()}, indent=2) + "\n")
    print(f"written: {path}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the KV hand-off between two processes of this machine.")
    parser.add_argument("--transports", nargs="+", choices=("shm", "tcp"), default=["shm", "tcp"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens of the last chunk, which comes late")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    return parser.parse_args(argv)


def measure(case: Case, rounds: int) -> Figures:
    """Runs the producer in a child process for as long as the measurement lasts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=run_producer, args=(theirs, case))
    child.start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(consume(ours, case, rounds))
    finally:
        ours.send(None)
        child.join()


def run_producer(pipe: Connection, case: Case) -> None:
    run(produce(pipe, case))


async def produce(pipe: Connection, case: Case) -> None:
    """Obeys orders until None comes."""
    pool = KvPool.create(case.layout, case.num_blocks)
    pool.tensor.normal_()
    port = free_port("127.0.0.1")
    identity = ProducerIdentity("bench-producer", *DIGESTS, f"127.0.0.1:{port}")
    producer = KvProducer(pool, identity, lease_s=30.0, free=lambda block_ids: None, transports=("shm", "tcp"))
    server = Server("bench", ServerSettings(port=port, grace_s=0.1))
    server.add(
        kv_pb2_grpc.add_KvTransferServiceServicer_to_server, KvTransferServicer(producer), "tandem.worker.v1.KvTransferService"
    )
    await producer.start()
    await server.start()
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(obey(producer, case, order))
    server.stop()
    await server.run_until_stopped(no_step, producer.close)
    pool.close()


def obey(producer: KvProducer, case: Case, order: KvTicket | int) -> KvTicket | int:
    """A number of ready tokens: grants a ticket. A ticket: finishes it, and says when (monotonic clock, ns)."""
    if isinstance(order, KvTicket):
        now = time.monotonic_ns()
        producer.finish(order.ticket_id, 1)
        return now
    ticket = producer.grant(1, case.prompt_tokens, list(range(case.num_blocks)))
    producer.progress(ticket.ticket_id, case.layout.blocks_for(order))
    if order == case.prompt_tokens:
        producer.finish(ticket.ticket_id, 1)
    return ticket


async def no_step() -> None:
    """There is nothing to drain."""


async def consume(pipe: Connection, case: Case, rounds: int) -> Figures:
    pool = KvPool.create(case.layout, case.num_blocks)
    pool.tensor.zero_()
    puller = KvPuller(pool, case.layout, *DIGESTS, channels=open_internal_channel, transports=(case.transport,))
    await one_late_chunk(pipe, puller, case)
    whole = [await one_whole_prompt(pipe, puller, case) for _ in range(rounds)]
    late = [await one_late_chunk(pipe, puller, case) for _ in range(rounds)]
    await puller.close()
    num_bytes = case.num_blocks * case.layout.block_bytes
    whole_ms = statistics.median(whole)
    return Figures(num_bytes / 2**20, num_bytes / whole_ms / 1e6, whole_ms, statistics.median(late), percentile(late, 99))


async def one_whole_prompt(pipe: Connection, puller: KvPuller, case: Case) -> float:
    """Milliseconds of a pull whose blocks were ready, checksums and all, before it began."""
    ticket: KvTicket = await ask(pipe, case.prompt_tokens)
    await asyncio.sleep(0.02)
    began = time.monotonic_ns()
    await puller.pull(ticket, range(case.num_blocks))
    took = time.monotonic_ns() - began
    await puller.release(ticket)
    return took / 1e6


async def one_late_chunk(pipe: Connection, puller: KvPuller, case: Case) -> float:
    """Milliseconds from the last chunk's end until the pull's, where the rest has long arrived."""
    ticket: KvTicket = await ask(pipe, case.prompt_tokens - case.chunk_tokens)
    pulling = asyncio.create_task(puller.pull(ticket, range(case.num_blocks)))
    await asyncio.sleep(0.05)
    pulling.add_done_callback(lambda _: ended.append(time.monotonic_ns()))
    ended: list[int] = []
    finished_ns: int = await ask(pipe, ticket)
    await pulling
    await puller.release(ticket)
    return (ended[0] - finished_ns) / 1e6


async def ask(pipe: Connection, order: Any) -> Any:
    await asyncio.to_thread(pipe.send, order)
    return await asyncio.to_thread(pipe.recv)


def print_table(rows: Mapping[str, Figures], title: str) -> None:
    table = Table(title=title)
    for heading in ("transport, KV", "MiB", "GB/s", "whole p50 ms", "hand-off p50 ms", "hand-off p99 ms"):
        table.add_column(heading, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in asdict(figures).values()))
    Console().print(table)


if __name__ == "__main__":
    main()

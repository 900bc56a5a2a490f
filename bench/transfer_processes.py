"""The two processes of `bench.transfer`: a producer in a child process that obeys orders, and what the consumer here measures."""

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from bench.figures import percentile
from kvtransfer.blocks import MakeBlocks, blocks_of
from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.puller import KvPuller
from kvtransfer.service import KvTransferServicer
from kvtransfer.ticket import KvTicket
from llm.kv.exported_memory import ExportedMemory
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.ops.cpu.native import library
from tandem.addresses import free_port
from tandem.channels import open_internal_channel
from tandem.models import cache_directory
from tandem.server import Server, ServerSettings, run
from tandem.worker.v1 import kv_pb2_grpc

DIGESTS = ("model", "tokenizer")

ANSWER_AFTER_S = 0.02
"""An answer to Finish waits for so long: else it would go before what is measured, and be read while the consumer copies."""


@dataclass(frozen=True)
class Pair:
    """A producer's and a consumer's pool of `num_blocks` blocks each."""

    layout: KvLayout
    num_blocks: int
    producer_device: str
    consumer_device: str
    make_blocks: MakeBlocks = blocks_of
    """How the producer reads its blocks, and the consumer its own."""


@dataclass(frozen=True)
class Case:
    """What is moved. `chunk_tokens` of the prompt are missing until `finish` in the latency runs."""

    transport: str
    prompt_tokens: int
    chunk_tokens: int
    rounds: int


@dataclass(frozen=True)
class Figures:
    """Medians and 99th percentiles over the rounds. `whole`: a prompt that is ready at once, from the call of pull."""

    mib: float
    gb_per_second: float
    whole_p50_ms: float
    handoff_p50_ms: float
    handoff_p99_ms: float


@dataclass(frozen=True)
class Grant:
    """An order: a ticket for a prompt, of which so many tokens are computed."""

    prompt_tokens: int
    ready_tokens: int


@dataclass(frozen=True)
class Finish:
    """An order: the ticket's prompt is computed now; the answer is when that was (monotonic clock, ns)."""

    ticket_id: str


@dataclass(frozen=True)
class Export:
    """An order: how the pool's GPU memory is opened; None if it has none."""


@contextmanager
def producer_process(pair: Pair) -> Iterator[Connection]:
    """The child, and the pipe that takes orders to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run_producer, args=(theirs, pair))
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        child.join()


def _run_producer(pipe: Connection, pair: Pair) -> None:
    run(_produce(pipe, pair))


async def _produce(pipe: Connection, pair: Pair) -> None:
    """Obeys until the other side closes the pipe."""
    load_native()
    pool = await asyncio.to_thread(KvPool.create, pair.layout, pair.num_blocks, pair.producer_device)
    pool.tensor.normal_()
    port = free_port("127.0.0.1")
    identity = ProducerIdentity("bench-producer", *DIGESTS, f"127.0.0.1:{port}")
    producer = KvProducer(pool, identity, lease_s=30.0, free=lambda block_ids: None, make_blocks=pair.make_blocks)
    server = Server("bench", ServerSettings(port=port, grace_s=0.1))
    server.add(
        kv_pb2_grpc.add_KvTransferServiceServicer_to_server, KvTransferServicer(producer), "tandem.worker.v1.KvTransferService"
    )
    await producer.start()
    await server.start()
    try:
        while True:
            order = await asyncio.to_thread(pipe.recv)
            answer = _obey(order, producer, pool)
            if isinstance(order, Finish):
                await asyncio.sleep(ANSWER_AFTER_S)
            pipe.send(answer)
    except EOFError:
        pass
    server.stop()
    await server.run_until_stopped(_no_step, producer.close)
    pool.close()


def _obey(order: Grant | Finish | Export, producer: KvProducer, pool: KvPool) -> KvTicket | ExportedMemory | int | None:
    match order:
        case Export():
            return pool.exported
        case Finish(ticket_id):
            now = time.monotonic_ns()
            producer.finish(ticket_id, 1)
            return now
        case Grant(prompt_tokens, ready_tokens):
            ticket = producer.grant(1, prompt_tokens, scattered(pool.num_blocks, pool.layout.blocks_for(prompt_tokens)))
            producer.progress(ticket.ticket_id, pool.layout.blocks_for(ready_tokens))
            if ready_tokens == prompt_tokens:
                producer.finish(ticket.ticket_id, 1)
            return ticket


def load_native() -> None:
    """As a worker on a CPU does with its model; without a compiler blocks are copied plainly."""
    with suppress(library.NativeUnavailableError):
        library.load(cache_directory())


async def _no_step() -> None:
    """There is nothing to drain."""


def scattered(num_blocks: int, count: int) -> list[int]:
    """As the blocks of a pool in use are."""
    return random.Random(count).sample(range(num_blocks), count)


class Consumer:
    """Pulls from the producer that obeys at the other end of the pipe, by one transport."""

    def __init__(self, pipe: Connection, puller: KvPuller, pool: KvPool, *, beats: bool) -> None:
        self._pipe = pipe
        self._puller = puller
        self._pool = pool
        self._beats = beats

    @classmethod
    @asynccontextmanager
    async def over(
        cls, pipe: Connection, pool: KvPool, transport: str, make_blocks: MakeBlocks = blocks_of, *, beats: bool = True
    ) -> AsyncIterator["Consumer"]:
        """`beats`: whether it sends heartbeats."""
        channels = open_internal_channel
        puller = KvPuller(pool, pool.layout, *DIGESTS, channels=channels, transports=(transport,), make_blocks=make_blocks)
        try:
            yield cls(pipe, puller, pool, beats=beats)
        finally:
            await puller.close()

    async def measure(self, case: Case) -> Figures:
        for _ in range(2):
            await self.late_chunk(case)
        whole = [await self.whole_prompt(case) for _ in range(case.rounds)]
        late = [await self.late_chunk(case) for _ in range(case.rounds)]
        num_bytes = self._pool.layout.blocks_for(case.prompt_tokens) * self._pool.layout.block_bytes
        whole_ms = statistics.median(whole)
        return Figures(num_bytes / 2**20, num_bytes / whole_ms / 1e6, whole_ms, statistics.median(late), percentile(late, 99))

    async def whole_prompt(self, case: Case) -> float:
        """Milliseconds of a pull whose blocks were ready, checksums and all, before it began."""
        ticket = await self._ticket(Grant(case.prompt_tokens, case.prompt_tokens))
        await asyncio.sleep(0.02)
        began = time.monotonic_ns()
        await self._puller.pull(ticket, self._block_ids(ticket))
        took = time.monotonic_ns() - began
        await self._puller.release(ticket)
        return took / 1e6

    async def late_chunk(self, case: Case) -> float:
        """Milliseconds from the last chunk's end until the pull's, where the rest has long arrived."""
        ticket = await self._ticket(Grant(case.prompt_tokens, case.prompt_tokens - case.chunk_tokens))
        pulling = asyncio.create_task(self._puller.pull(ticket, self._block_ids(ticket)))
        ended: list[int] = []
        pulling.add_done_callback(lambda _: ended.append(time.monotonic_ns()))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(self._pipe.send, Finish(ticket.ticket_id))
        await pulling
        finished_ns: int = await asyncio.to_thread(self._pipe.recv)
        await self._puller.release(ticket)
        return (ended[0] - finished_ns) / 1e6

    async def _ticket(self, order: Grant) -> KvTicket:
        ticket: KvTicket = await ask(self._pipe, order)
        return ticket if self._beats else replace(ticket, heartbeat=None)

    def _block_ids(self, ticket: KvTicket) -> Sequence[int]:
        return scattered(self._pool.num_blocks, len(ticket.block_ids))


async def ask(pipe: Connection, order: Any) -> Any:
    await asyncio.to_thread(pipe.send, order)
    return await asyncio.to_thread(pipe.recv)

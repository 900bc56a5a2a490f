"""A producer and a consumer of KV blocks in one process, over loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil
import torch

from kvtransfer.lifeline import Lifeline
from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.puller import KvPuller
from kvtransfer.service import KvTransferServicer
from kvtransfer.ticket import TRANSPORTS, KvTicket
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.addresses import free_port
from tandem.channels import open_internal_channel
from tandem.interceptor import Interceptor
from tandem.server import server_options
from tandem.worker.v1 import kv_pb2_grpc
from tests.fakes.clock import Clock

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=4, dtype="float32")
NUM_BLOCKS = 40
LEASE_S = 5.0
FIRST_TOKEN = 4711


@dataclass
class Transfer:
    """Both sides. The producer's blocks hold random content; the consumer's hold zeros."""

    source: KvPool
    target: KvPool
    producer: KvProducer
    puller: KvPuller
    server: grpc.aio.Server
    clock: Clock = field(default_factory=Clock)
    freed: list[tuple[int, ...]] = field(default_factory=list)

    def grant(self, block_ids: Sequence[int] = tuple(range(8)), epoch: int = 1) -> KvTicket:
        return self.producer.grant(epoch, len(block_ids) * LAYOUT.block_tokens, block_ids)

    def complete(self, block_ids: Sequence[int] = tuple(range(8))) -> KvTicket:
        """A ticket whose prompt is computed."""
        ticket = self.grant(block_ids)
        self.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        return ticket

    async def sealed(self, block_ids: Sequence[int] = tuple(range(8))) -> KvTicket:
        """A finished ticket whose checksums are all known, so that one frame tells all blocks."""
        ticket = self.complete(block_ids)
        await self.until(lambda: self.producer._outboxes[ticket.ticket_id].num_checksums == len(ticket.block_ids))
        return ticket

    def arrived(self, ticket: KvTicket, block_ids: Sequence[int]) -> bool:
        return torch.equal(_words(self.target)[list(block_ids)], _words(self.source)[list(ticket.block_ids)])

    def flip(self, block_id: int, offset: int = 100) -> None:
        """Damages a byte in the producer's memory."""
        _words(self.source)[block_id, offset // 4] ^= 0x10

    def wait(self, seconds: float) -> None:
        """Lets time pass for the leases."""
        self.clock.now += seconds
        self.producer.expire_leases()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets everything else run until the condition holds."""
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110 - whatever changes it knows no event
                await asyncio.sleep(0.0005)

    def heard(self, ticket: KvTicket) -> bool:
        """Whether the ticket's consumer has sent a heartbeat since it opened its stream."""
        return self.producer._ledger.pulse.heard_at(ticket.ticket_id) is not None

    def lifeline_of(self, ticket: KvTicket) -> Lifeline:
        with self.puller._peers.using(ticket) as peer:
            assert ticket.heartbeat is not None
            line = peer._line(ticket.heartbeat)
        line.start()
        return line

    def num_readers(self, ticket: KvTicket) -> int:
        entry = self.producer._ledger.get(ticket.ticket_id)
        return 0 if entry is None else entry.num_readers


@contextlib.asynccontextmanager
async def transfer(*transports: str, make_pool: Callable[[KvLayout, int], KvPool] = KvPool.create) -> AsyncIterator[Transfer]:
    """Both sides, running; checks at the end that nothing is left of them."""
    tasks, sockets = asyncio.all_tasks(), num_sockets()
    source, target = make_pool(LAYOUT, NUM_BLOCKS), make_pool(LAYOUT, NUM_BLOCKS)
    source.tensor.normal_(generator=torch.Generator().manual_seed(0))
    clock, freed = Clock(), list[tuple[int, ...]]()
    port = free_port("127.0.0.1")
    producer = KvProducer(
        source,
        ProducerIdentity("p" * 32, "model", "tokenizer", f"127.0.0.1:{port}"),
        lease_s=LEASE_S,
        free=lambda block_ids: freed.append(tuple(block_ids)),
        clock=clock,
    )
    server = grpc.aio.server(interceptors=[Interceptor()], options=server_options(100))
    kv_pb2_grpc.add_KvTransferServiceServicer_to_server(KvTransferServicer(producer), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    puller = KvPuller(target, LAYOUT, "model", "tokenizer", channels=open_internal_channel, transports=transports or TRANSPORTS)
    await producer.start()
    await puller.start()
    await server.start()
    both = Transfer(source, target, producer, puller, server, clock, freed)
    try:
        yield both
    finally:
        await puller.close()
        await server.stop(None)
        await producer.close()
        source.close()
        target.close()
    assert producer.num_outstanding == 0
    await both.until(lambda: asyncio.all_tasks() <= tasks)
    await both.until(lambda: num_sockets() <= sockets)


def _words(pool: KvPool) -> torch.Tensor:
    """A row a block."""
    return pool.tensor.view(pool.num_blocks, -1).view(torch.int32)


def num_mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("tandem-kv")


def num_sockets() -> int:
    """TCP sockets of this process; gRPC's own end a moment after they are closed."""
    return len(psutil.Process().net_connections("tcp"))

"""The hand-off between two processes and their pools in GPU memory, by each transport."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from kvtransfer.puller import KvPuller
from kvtransfer.ticket import KvTicket, NcclOffer
from kvtransfer.wire import ticket_from_proto
from llm.kv.device_memory import DeviceMemoryError, ImportedMemory
from llm.kv.pool import KvPool
from tandem.addresses import free_port
from tandem.channels import open_internal_channel
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import kv_pb2
from tests.gpu.producer_process import FIRST_TOKEN, LAYOUT, NUM_BLOCKS, checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(180),
]

MINE = [*range(1, 301), 600]
UNTOUCHED = sorted({*range(NUM_BLOCKS)} - {*MINE})
TRANSPORTS = ("cuda_ipc", "nccl", "tcp")


@dataclass
class Producer:
    """The other process, and what it granted."""

    process: subprocess.Popen[str]
    ticket: KvTicket
    checksum: int

    def damage(self) -> None:
        """Changes a block that has been told already."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "damaged\n"


@contextmanager
def producer_on(device: str) -> Iterator[Producer]:
    command = [sys.executable, "-m", "tests.gpu.producer_process", f"127.0.0.1:{free_port('127.0.0.1')}", device]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        message = kv_pb2.KvTicket.FromString(bytes.fromhex(process.stdout.readline()))
        yield Producer(process, ticket_from_proto(message), int(process.stdout.readline()))
        if process.poll() is None:
            process.stdin.close()
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["same GPU", "two GPUs"])
def producer(request: pytest.FixtureRequest) -> Iterator[Producer]:
    if request.param == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    with producer_on("cuda:0" if request.param == "same GPU" else "cuda:1") as started:
        yield started


def skip_nccl_on_one_gpu(producer: Producer, pool: KvPool, transport: str) -> None:
    assert pool.exported is not None
    own = pool.exported.device_uuid
    if transport == "nccl" and any(isinstance(offer, NcclOffer) and offer.device_uuid == own for offer in producer.ticket.offers):
        pytest.skip("NCCL does not join two processes of one GPU")


@pytest.fixture
def pool() -> Iterator[KvPool]:
    made = KvPool.create(LAYOUT, NUM_BLOCKS, "cuda:0")
    yield made
    made.close()


def pulling(pool: KvPool, transport: str, work: Callable[[KvPuller], Awaitable[None]]) -> None:
    """With a puller that has this transport only."""

    async def run() -> None:
        puller = KvPuller(pool, LAYOUT, "model", "tokenizer", channels=open_internal_channel, transports=(transport,))
        try:
            await work(puller)
        finally:
            await puller.close()

    asyncio.run(run())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_blocks_arrive_and_nothing_else_changes(producer: Producer, pool: KvPool, transport: str) -> None:
    skip_nccl_on_one_gpu(producer, pool, transport)

    async def work(puller: KvPuller) -> None:
        for _ in range(3):
            pool.tensor.fill_(torch.nan)
            torch.cuda.synchronize()
            result = await puller.pull(producer.ticket, MINE)
            assert (result.transport, result.first_token_id, result.num_refetched) == (transport, FIRST_TOKEN, 0)
            assert checksum(pool, MINE) == producer.checksum
            assert pool.tensor[UNTOUCHED].isnan().all()
        await puller.release(producer.ticket)

    pulling(pool, transport, work)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_block_changed_after_it_was_told_is_refused(producer: Producer, pool: KvPool, transport: str) -> None:
    skip_nccl_on_one_gpu(producer, pool, transport)

    async def work(puller: KvPuller) -> None:
        with pytest.raises(TandemError) as caught:
            await puller.pull(producer.ticket, MINE)
        assert (caught.value.reason, caught.value.metadata["block_index"]) == (Reason.KV_CHECKSUM_MISMATCH, "40")
        await puller.release(producer.ticket)

    producer.damage()
    pulling(pool, transport, work)


def test_blocks_come_to_a_pool_of_the_host(producer: Producer) -> None:
    async def work(puller: KvPuller) -> None:
        await puller.pull(producer.ticket, MINE)
        assert checksum(pool, MINE) == producer.checksum
        await puller.release(producer.ticket)

    pool = KvPool.create(LAYOUT, NUM_BLOCKS)
    pulling(pool, "tcp", work)
    pool.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_producer_harms_nobody(producer: Producer, pool: KvPool, transport: str) -> None:
    """Its memory may go, but not this process's use of the GPU."""

    skip_nccl_on_one_gpu(producer, pool, transport)

    async def work(puller: KvPuller) -> None:
        await puller.pull(producer.ticket, MINE)
        producer.process.kill()
        producer.process.wait()
        with pytest.raises(TandemError):
            await puller.pull(producer.ticket, MINE)

    pulling(pool, transport, work)
    pool.tensor.fill_(1.0)
    assert pool.tensor.float().mean().item() == 1.0


def test_memory_is_opened_closed_and_given_back(pool: KvPool) -> None:
    with producer_on("cuda:0") as producer:
        exported = producer.ticket.offers[0].memory  # type: ignore[union-attr]
        free, _ = torch.cuda.mem_get_info(0)
        for _ in range(3):
            memory = ImportedMemory(exported, torch.device("cuda:0"))
            assert memory.on_same_device and not memory.producer_is_gone
            memory.close()
        assert abs(torch.cuda.mem_get_info(0)[0] - free) < 64 << 20
        with pytest.raises(DeviceMemoryError):
            ImportedMemory(replace(exported, handle=bytes(64)), torch.device("cuda:0"))
    with pytest.raises(DeviceMemoryError):
        ImportedMemory(exported, torch.device("cuda:0"))


def test_pools_are_given_back() -> None:
    KvPool.create(LAYOUT, NUM_BLOCKS, "cuda:0").close()
    free, _ = torch.cuda.mem_get_info(0)
    for _ in range(3):
        KvPool.create(LAYOUT, NUM_BLOCKS, "cuda:0").close()
    assert abs(torch.cuda.mem_get_info(0)[0] - free) < 8 << 20
    with pytest.raises(DeviceMemoryError):
        KvPool.create(LAYOUT, 1 << 30, "cuda:0")

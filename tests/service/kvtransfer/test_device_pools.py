"""The hand-off between pools in GPU memory; the GPUs and kernels are faked (the kernels have tests of their own)."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtransfer.ticket import CudaIpcOffer, KvTicket
from llm.kv.block_arrays import Sums
from llm.kv.device_memory import DeviceMemoryError
from llm.kv.host_identity import process_start_ticks
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError
from tests.fakes.clock import Clock
from tests.fakes.cuda_calls import FakeCuda
from tests.service.kvtransfer.gpu_harness import device_blocks, device_lane, fake_gpus, gpu_pool
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, Transfer, transfer

MINE = [7, 3, 30, 11, 0, 22, 5, 38]
both_transports = pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_gpus(monkeypatch)


@asynccontextmanager
async def on_gpus(*transports: str) -> AsyncIterator[Transfer]:
    async with transfer(*(transports or ("cuda_ipc", "tcp")), make_pool=gpu_pool) as at:
        yield at


@both_transports
async def test_blocks_arrive_as_they_are_computed(cuda: FakeCuda, transport: str) -> None:
    async with on_gpus(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 3)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        result = await at.puller.pull(ticket, MINE)
        assert (result.transport, result.first_token_id, result.num_refetched) == (transport, FIRST_TOKEN, 0)
        assert at.arrived(ticket, MINE)
        untouched = [block for block in range(at.target.num_blocks) if block not in MINE]
        assert not at.target.tensor[untouched].any()
    assert (cuda.memory, cuda.opened) == ({}, [])


def with_memory(ticket: KvTicket, **fields: object) -> KvTicket:
    return replace(
        ticket,
        offers=tuple(
            CudaIpcOffer(replace(offer.memory, **fields)) if isinstance(offer, CudaIpcOffer) else offer for offer in ticket.offers
        ),
    )


async def test_what_is_said_of_the_choice(cuda: FakeCuda) -> None:
    async with on_gpus() as at:
        assert str(await at.puller.choose(at.complete())) == "cuda_ipc: same GPU, opened"
        other = with_memory(at.complete(), handle=bytes(64))
        assert str(await at.puller.choose(other)) == "tcp: producer has offered other memory before under the same id"
        impostor = replace(at.complete(), producer_id="another", address="127.0.0.1:1")
        assert str(await at.puller.choose(impostor)) == "tcp: offered memory is that of another producer (producer id differs)"
    async with on_gpus("tcp") as at:
        assert str(await at.puller.choose(at.complete())) == "tcp: cuda_ipc is switched off here"


async def test_memory_of_another_gpu_is_read_from_there(cuda: FakeCuda) -> None:
    async with on_gpus("cuda_ipc") as at:
        ticket = with_memory(at.complete(), device_uuid=cuda.uuids[1])
        assert str(await at.puller.choose(ticket)) == "cuda_ipc: same host, read from GPU to GPU"
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"boot_id": "another"}, "producer runs on another host (boot id differs)"),
        ({"boot_id": ""}, "producer runs on another host (boot id differs)"),
        ({"device_uuid": "c" * 32}, "producer's GPU is not visible from here (another container, or CUDA_VISIBLE_DEVICES)"),
        ({"device_uuid": "b" * 32}, "the two GPUs cannot read each other's memory"),
        ({"handle": bytes(64)}, "producer's GPU memory cannot be opened (invalid resource handle)"),
        ({"num_bytes": 1}, "ticket names blocks outside of the offered memory"),
        ({"pid": os.getpid(), "process_start_ticks": process_start_ticks(os.getpid())}, "producer is this very process"),
    ],
)
async def test_else_tcp_with_the_reason(cuda: FakeCuda, fields: dict[str, object], reason: str) -> None:
    cuda.strangers = frozenset({(0, 1)})
    async with on_gpus() as at:
        ticket = with_memory(at.complete(), **fields)
        for _ in range(2):
            assert str(await at.puller.choose(ticket)) == f"tcp: {reason}"
        assert (await at.puller.pull(ticket, MINE)).transport == "tcp"
        assert at.arrived(ticket, MINE)
    assert cuda.opened == []


@both_transports
async def test_a_damaged_block_is_refused(cuda: FakeCuda, transport: str) -> None:
    async with on_gpus(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 8)
        await at.until(lambda: at.producer._outboxes[ticket.ticket_id].num_checksums == 8)
        at.flip(5)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert (caught.value.reason, caught.value.metadata["block_index"]) == (Reason.KV_CHECKSUM_MISMATCH, "5")


@both_transports
async def test_a_cancelled_pull_leaves_the_blocks_alone(cuda: FakeCuda, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends only when the GPU has done with them; a second pull finds all staging memory free."""
    entered, leave = threading.Event(), threading.Event()
    whole = device_lane.Lane._checksums

    def held(lane: object, count: int) -> Sums:
        if threading.current_thread().name.startswith("kv-pull"):
            entered.set()
            assert leave.wait(30)
        return whole(lane, count)

    monkeypatch.setattr(device_lane.Lane, "_checksums", held)
    monkeypatch.setattr("kvtransfer.device_blocks.HERE_BYTES", 0)
    async with on_gpus(transport) as at:
        ticket = at.complete()
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await asyncio.to_thread(entered.wait, 30)
        pulling.cancel()
        await asyncio.sleep(0)
        assert not pulling.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)


@pytest.mark.parametrize(("here_bytes", "on_loop"), [(1 << 20, True), (0, False)])
async def test_the_event_loop_sees_to_few_blocks(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, here_bytes: int, on_loop: bool
) -> None:
    names, whole = list[str](), device_lane.Lane._upload

    def noted(lane: object, *arguments: Any) -> object:
        names.append(threading.current_thread().name)
        return whole(lane, *arguments)

    monkeypatch.setattr(device_lane.Lane, "_upload", noted)
    monkeypatch.setattr("kvtransfer.device_blocks.HERE_BYTES", here_bytes)
    monkeypatch.setattr("kvtransfer.device_blocks.SLOW_S", 60.0)
    async with on_gpus("cuda_ipc") as at:
        await at.puller.start()
        names.clear()
        ticket = await at.sealed()
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)
    assert len(names) == 2
    assert {name == threading.main_thread().name for name in names} == {on_loop}


def test_threads_wait_for_a_gpu_that_was_slow(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock, takes_s = gpu_pool(LAYOUT, 3), Clock(), 0.0
    blocks, block_ids = device_blocks.DeviceBlocks(pool, clock), np.arange(2, dtype=np.int32)
    whole = device_lane.Lane._checksums

    def slow(lane: object, count: int) -> Sums:
        clock.now += takes_s
        return whole(lane, count)

    monkeypatch.setattr(device_lane.Lane, "_checksums", slow)
    blocks.checksums(block_ids)
    assert blocks.num_here == device_lane.MAX_BLOCKS
    takes_s = 2 * device_blocks.SLOW_S
    with ThreadPoolExecutor(1) as threads:
        threads.submit(blocks.checksums, block_ids).result()
    assert blocks.num_here == device_lane.MAX_BLOCKS, "only the loop's own waits count"
    blocks.checksums(block_ids)
    assert blocks.num_here == 0
    clock.now += device_blocks.AWAY_S
    assert blocks.num_here == device_lane.MAX_BLOCKS
    pool.close()


def test_nothing_is_awaited_while_kernels_compile(cuda: FakeCuda) -> None:
    pool = gpu_pool(LAYOUT, 3)
    blocks, compiling = device_blocks.DeviceBlocks(pool), Future[None]()
    with ThreadPoolExecutor(1) as threads:
        wait(blocks.warm_up(threads, 1))
        assert blocks.num_here == device_lane.MAX_BLOCKS
        blocks._warming = [compiling]
        assert blocks.num_here == 0
    pool.close()


@pytest.mark.parametrize("kinds", [(gpu_pool, KvPool.create), (KvPool.create, gpu_pool)])
async def test_between_a_gpu_and_a_host_blocks_go_by_tcp(cuda: FakeCuda, kinds: tuple[Callable[..., KvPool], ...]) -> None:
    waiting = list(kinds)

    def make_pool(layout: KvLayout, num_blocks: int) -> KvPool:
        return waiting.pop(0)(layout, num_blocks)

    async with transfer(make_pool=make_pool) as at:
        ticket = at.complete()
        assert (await at.puller.pull(ticket, MINE)).transport == "tcp"
        assert at.arrived(ticket, MINE)


async def test_a_producer_that_ended_is_forgotten(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_gpus() as at:
        await at.puller.pull(at.complete(), MINE)
        (peer,) = at.puller._peers._peers.values()
        assert not peer.gone
        monkeypatch.setattr("llm.kv.device_memory.process_start_ticks", lambda pid: 0)
        assert peer.gone


def test_memory_that_cannot_be_had(cuda: FakeCuda) -> None:
    cuda.full = True
    with pytest.raises(DeviceMemoryError, match=r"0\.0 GiB cannot be had on cuda:0"):
        KvPool.create(LAYOUT, 3, "cuda:0")


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm.kv.cuda_calls", None)
    with pytest.raises(DeviceMemoryError, match=r"install tandem-serve\[cuda\]"):
        KvPool.create(LAYOUT, 3, "cuda:0")

"""The hand-off between pools in GPU memory; the GPUs and kernels are faked (the kernels have tests of their own)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from kvtransfer.checksum import block_checksum
from llm.kv.device_memory import DeviceMemory
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tests.fakes.cuda_calls import FakeCuda, as_of_another_process, install
from tests.fakes.interpreter import interpret_without_gpu
from tests.service.kvtransfer.harness import FIRST_TOKEN, Transfer, transfer

interpret_without_gpu()
device_lane = pytest.importorskip("llm.kv.device_lane")
copy_blocks_reference = pytest.importorskip("llm.ops.gpu.block_copy").copy_blocks_reference

MINE = [7, 3, 30, 11, 0, 22, 5, 38]
DEVICE = torch.device("cpu", 0)


def checksums(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    sums = [block_checksum(pool[block].view(torch.uint8).numpy().tobytes()) for block in block_ids.tolist()]
    return torch.tensor([value - (1 << 64) if value >> 63 else value for value in sums])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The interpreter takes one thread at a time, so references stand in for the kernels."""
    monkeypatch.setattr(device_lane, "copy_blocks", copy_blocks_reference)
    monkeypatch.setattr(device_lane, "block_checksums", checksums)
    return install(monkeypatch)


def device_pool(layout: KvLayout, num_blocks: int) -> KvPool:
    memory = DeviceMemory(num_blocks * layout.block_bytes, DEVICE)
    memory.exported = as_of_another_process(memory.exported)
    return KvPool.over(layout, memory)


@asynccontextmanager
async def on_gpus(*transports: str) -> AsyncIterator[Transfer]:
    async with transfer(*transports, make_pool=device_pool) as at:
        yield at


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
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

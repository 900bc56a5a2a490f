"""Pools in GPU memory for machines without a GPU."""

import pytest
import torch

from kvtransfer.checksum import block_checksum
from llm.kv.device_memory import DeviceMemory
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tests.fakes.cuda_calls import FakeCuda, as_of_another_process, install
from tests.fakes.interpreter import interpret_without_gpu

interpret_without_gpu()
device_lane = pytest.importorskip("llm.kv.device_lane")
device_blocks = pytest.importorskip("kvtransfer.device_blocks")
block_copy = pytest.importorskip("llm.ops.gpu.block_copy")


def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """References stand in for the kernels, since the interpreter takes one thread at a time."""
    monkeypatch.setattr(device_lane, "copy_blocks", block_copy.copy_blocks_reference)
    monkeypatch.setattr(device_lane, "copy_and_sum_stretches", _copies)
    monkeypatch.setattr(device_lane, "sum_stretches", lambda pool, block_ids, room: None)
    monkeypatch.setattr(device_lane, "finish_checksums", _checksums)
    return install(monkeypatch)


def gpu_pool(layout: KvLayout, num_blocks: int, number: int = 0) -> KvPool:
    """A pool on that GPU, as if it were another process's."""
    memory = DeviceMemory(num_blocks * layout.block_bytes, torch.device("cpu", number))
    memory.exported = as_of_another_process(memory.exported)
    return KvPool.over(layout, memory)


def _copies(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor | None, target_ids: torch.Tensor, room: torch.Tensor
) -> None:
    block_copy.copy_blocks_reference(source.view(torch.int64), target.view(torch.int64), source_ids, target_ids)


def _checksums(pool: torch.Tensor, block_ids: torch.Tensor, room: torch.Tensor, out: torch.Tensor) -> None:
    sums = [block_checksum(pool[block].view(torch.uint8).numpy().tobytes()) for block in block_ids.tolist()]
    out[: len(sums)] = torch.tensor([value - (1 << 64) if value >> 63 else value for value in sums])

"""GPUs that are host memory: what llm.kv.cuda_calls does, for processes without one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import pytest
import torch

from llm.kv import device_memory
from llm.kv.exported_memory import ExportedMemory
from llm.kv.host_identity import process_start_ticks


class CudaError(Exception):
    """As cupy's."""


@dataclass
class FakeCuda:
    """`uuids` names the GPUs; `strangers` are pairs that cannot read each other's memory; `full`: nothing can be allocated."""

    uuids: tuple[str, ...] = ("a" * 32, "b" * 32)
    strangers: frozenset[tuple[int, int]] = frozenset()
    full: bool = False
    broken_handles: bool = False
    memory: dict[int, torch.Tensor] = field(default_factory=dict)
    opened: list[int] = field(default_factory=list)

    CudaError = CudaError

    def allocate(self, num_bytes: int, device: int) -> int:
        if self.full:
            raise CudaError("out of memory")
        tensor = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
        self.memory[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def free(self, pointer: int, device: int) -> None:
        del self.memory[pointer]

    def handle_of(self, pointer: int, device: int) -> bytes:
        return pointer.to_bytes(64)

    def open_handle(self, handle: bytes, device: int) -> int:
        pointer = int.from_bytes(handle)
        if self.broken_handles or pointer not in self.memory or pointer in self.opened:
            raise CudaError("invalid resource handle")
        self.opened.append(pointer)
        return pointer

    def close_handle(self, pointer: int, device: int) -> None:
        self.opened.remove(pointer)

    def tensor_at(self, pointer: int, num_bytes: int, device: int) -> torch.Tensor:
        return self.memory[pointer][:num_bytes]

    def device_uuids(self) -> list[str]:
        return list(self.uuids)

    def reaches(self, device: int, other: int) -> bool:
        return (device, other) not in self.strangers


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Puts such GPUs in place of the real ones."""
    cuda = FakeCuda()
    monkeypatch.setattr(device_memory, "_cuda_calls", lambda: cuda)
    return cuda


def as_of_another_process(exported: ExportedMemory) -> ExportedMemory:
    """Tests that are both sides in one process pretend that the producer is this one's parent."""
    parent = os.getppid()
    return replace(exported, pid=parent, process_start_ticks=process_start_ticks(parent))

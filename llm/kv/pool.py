"""The memory that holds a worker's KV blocks."""

from __future__ import annotations

import contextlib
import math
import mmap
import os

import numpy as np
import numpy.typing as npt
import torch

from llm.kv.device_memory import DeviceMemory
from llm.kv.exported_memory import ExportedMemory
from llm.kv.generations import BlockGenerations
from llm.kv.layout import KvLayout
from llm.kv.memory_file import MemoryFile, allocate

MEMORY_NAME = "tandem-kv"
"""Name of the pool's memory file; seen in /proc only."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class KvPool:
    """`num_blocks` KV blocks of one layout on one device. The caller closes it.

    On Linux and CPU the memory is an anonymous memory file: other processes may map it, and it is gone with the last process that
    has it, however that ends. On a GPU it is an allocation of its own, which other processes may open too.
    """

    def __init__(
        self,
        layout: KvLayout,
        tensor: torch.Tensor,
        memory: mmap.mmap | None = None,
        shared: MemoryFile | None = None,
        device_memory: DeviceMemory | None = None,
    ) -> None:
        self.layout = layout
        self.tensor = tensor
        """[num_blocks, *layout.block_shape]"""
        self.shared = shared
        """None where the memory is not the host's or cannot be shared, or once closed."""
        self.num_blocks: int = tensor.shape[0]
        self.on_device = device_memory is not None
        self._memory = memory
        self._device_memory = device_memory
        self._bytes = None if memory is None else memoryview(memory)
        self.generations = BlockGenerations(self.num_blocks)
        """Whoever hands out blocks that others may read by a ticket bumps theirs."""

    @classmethod
    def create(cls, layout: KvLayout, num_blocks: int, device: str = "cpu") -> KvPool:
        """A pool of zeros; on a CPU its pages are taken from the system when they are first written. Raises DeviceMemoryError."""
        where = torch.device(device)
        num_bytes = num_blocks * layout.block_bytes
        if where.type == "cuda":
            return cls.over(layout, DeviceMemory(num_bytes, where))
        memory, shared = allocate(MEMORY_NAME, num_bytes)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        return cls(layout, blocks_in(tensor, layout), memory, shared)

    @classmethod
    def over(cls, layout: KvLayout, device_memory: DeviceMemory) -> KvPool:
        """A pool in that memory, which it takes over."""
        return cls(layout, blocks_in(device_memory.tensor, layout), device_memory=device_memory)

    @property
    def exported(self) -> ExportedMemory | None:
        """How others open the pool if it is a GPU's; None otherwise, or once closed."""
        return None if self._device_memory is None else self._device_memory.exported

    @property
    def host_bytes(self) -> npt.NDArray[np.uint8]:
        """The whole memory, not copied; on CPU only."""
        assert self._bytes is not None, "the pool is closed or not in host memory"
        return np.frombuffer(self._bytes, np.uint8)

    def block_view(self, block_id: int) -> memoryview:
        """A block's bytes, writable and not copied; on CPU only. IndexError if there is no such block."""
        assert self._bytes is not None, "the pool is closed or not in host memory"
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"the pool has no block {block_id}")
        size = self.layout.block_bytes
        return self._bytes[block_id * size : (block_id + 1) * size]

    def close(self) -> None:
        """Gives the memory back, on a CPU as soon as no tensor and no view of it is left either. Idempotent.

        On a GPU whoever still has a tensor of it must not use it any more.
        """
        if self.shared is not None:
            os.close(self.shared.fd)
        self.shared = None
        self.generations.close()
        self.tensor = torch.empty(0)
        # Whoever still has a tensor or view of the memory keeps it mapped; the last of them unmaps it.
        with contextlib.suppress(BufferError):
            if self._bytes is not None:
                self._bytes.release()
            if self._memory is not None:
                self._memory.close()
        self._bytes = self._memory = None
        if self._device_memory is not None:
            self._device_memory.free()
            self._device_memory = None


def blocks_in(memory: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    """A tensor of bytes as one of blocks; a rest that holds no whole block is left out."""
    num_blocks, items = memory.numel() // layout.block_bytes, math.prod(layout.block_shape)
    blocks = memory[: num_blocks * layout.block_bytes].view(_DTYPES[layout.dtype]).view(num_blocks, -1)
    return blocks[:, :items].view(num_blocks, *layout.block_shape)

"""Copies and checksums of KV blocks in host memory, on the calling thread and without the GIL."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from llm.kv.block_arrays import BlockIds, Sums
from llm.ops import xxh3
from llm.ops.cpu.native import library

Memory = npt.NDArray[np.uint8]
"""A pool's bytes."""


class Copies(Protocol):
    """For blocks of one size."""

    def checksums(self, pool: Memory, block_ids: BlockIds) -> Sums: ...

    def copy(self, source: Memory, source_ids: BlockIds, target: Memory, target_ids: BlockIds) -> Sums:
        """The checksums of what was copied."""


class NativeCopies:
    """One pass for both, over blocks of whole 1,024-byte stretches.

    A call takes as long as the copying of 100 KB, most of it for addresses: they are asked for no more often than needed.
    """

    def __init__(self, native: ctypes.CDLL, block_bytes: int) -> None:
        self._native = native
        self._block_bytes = block_bytes
        self._table = np.array(xxh3.table(), np.int64)
        self._table_address = self._table.ctypes.data

    def checksums(self, pool: Memory, block_ids: BlockIds) -> Sums:
        self._check(pool, block_ids)
        sums = (ctypes.c_uint64 * len(block_ids))()
        self._native.tandem_sum_blocks(
            pool.ctypes.data, block_ids.tobytes(), len(sums), self._block_bytes // 8, sums, self._table_address
        )
        return np.frombuffer(memoryview(sums), np.uint64)

    def copy(self, source: Memory, source_ids: BlockIds, target: Memory, target_ids: BlockIds) -> Sums:
        sums = (ctypes.c_uint64 * len(source_ids))()
        self._copy(source, source_ids, target, target_ids, sums)
        return np.frombuffer(memoryview(sums), np.uint64)

    def _copy(
        self, source: Memory, source_ids: BlockIds, target: Memory, target_ids: BlockIds, sums: ctypes.Array[ctypes.c_uint64] | None
    ) -> None:
        self._check(source, source_ids)
        self._check(target, target_ids)
        assert len(source_ids) == len(target_ids) and target.flags.writeable
        self._native.tandem_copy_blocks(
            source.ctypes.data, source_ids.tobytes(), target.ctypes.data, target_ids.tobytes(),
            len(source_ids), self._block_bytes // 8, sums, self._table_address,
        )  # fmt: skip

    def _check(self, pool: Memory, block_ids: BlockIds) -> None:
        """Whoever is wrong about them would read or write memory of others."""
        assert pool.flags.c_contiguous and block_ids.dtype == np.int32
        num_blocks, listed = pool.nbytes // self._block_bytes, block_ids.tolist()
        assert not listed or 0 <= min(listed) <= max(listed) < num_blocks, "a block outside of the pool"


class PlainCopies:
    """Block after block, in two passes: for blocks of other sizes, and where there is no native code."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes

    def checksums(self, pool: Memory, block_ids: BlockIds) -> Sums:
        return np.array([xxhash.xxh3_64_intdigest(self._block(pool, block).data) for block in block_ids.tolist()], np.uint64)

    def copy(self, source: Memory, source_ids: BlockIds, target: Memory, target_ids: BlockIds) -> Sums:
        for there, here in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
            np.copyto(self._block(target, here), self._block(source, there))
        return self.checksums(target, target_ids)

    def _block(self, memory: Memory, block: int) -> Memory:
        return memory[block * self._block_bytes : (block + 1) * self._block_bytes]


def copies_of(block_bytes: int) -> Copies:
    """The fastest for blocks of that size that this process has loaded the code for."""
    native = library.loaded()
    if native is None or block_bytes % xxh3.STRETCH_BYTES:
        return PlainCopies(block_bytes)
    return NativeCopies(native, block_bytes)

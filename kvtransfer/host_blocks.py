"""A pool's blocks in host memory, as transfers see them."""

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from kvtransfer.checksum import block_checksum
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.pool import KvPool

LEAST_BYTES, JOB_BYTES = 1 << 19, 1 << 22
"""Least and most that one job reads or copies: worth waking a thread for; and little enough for other pulls to get their turn."""

Memory = npt.NDArray[np.uint8]
"""Another pool's bytes."""


class HostBlocks:
    """Copies and checksums on the calling thread; neither holds the GIL."""

    num_per_turn = 1

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._block_bytes = pool.layout.block_bytes
        self.least_per_job = max(1, LEAST_BYTES // pool.layout.block_bytes)
        self.num_per_job = max(1, JOB_BYTES // pool.layout.block_bytes)

    def warm_up(self, threads: Executor, num_threads: int) -> None:
        pass

    def view(self, block_id: int) -> memoryview:
        return self._pool.block_view(block_id)

    def checksums(self, block_ids: BlockIds) -> Sums:
        return _sums([block_checksum(self.view(block)) for block in block_ids.tolist()])

    def fetch(self, memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        """Copies blocks of another pool of the same layout, given as its bytes; the checksums of what then lies in ours."""
        size = self._block_bytes
        for source, block in zip(source_ids.tolist(), block_ids.tolist(), strict=True):
            _copy(memory[source * size : (source + 1) * size], self.view(block))
        return self.checksums(block_ids)


def _copy(source: Memory, target: memoryview) -> None:
    """Unlike assignment to a memoryview, this does not hold the GIL."""
    np.copyto(np.frombuffer(target, np.uint8), source)


def _sums(checksums: Sequence[int]) -> Sums:
    return np.array(checksums, np.uint64)

"""A pool's blocks in host memory, as transfers see them."""

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from kvtransfer.checksum import block_checksum
from llm.kv.pool import KvPool

JOB_BYTES = 1 << 21
"""What one job reads or copies: enough to be worth waking a thread, little enough to share among threads, and so little that a
consumer starts on a chunk's first blocks while the producer still reads the last."""


class HostBlocks:
    """Copies and checksums on the calling thread; neither holds the GIL."""

    num_per_turn = 1

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self.num_per_job = max(1, JOB_BYTES // pool.layout.block_bytes)

    def warm_up(self, threads: Executor, num_threads: int) -> None:
        pass

    def view(self, block_id: int) -> memoryview:
        return self._pool.block_view(block_id)

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        return [block_checksum(self._pool.block_view(block)) for block in block_ids]

    def fetch(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> list[int]:
        """Copies blocks into ours; the checksums of what then lies there."""
        for source, block in zip(sources, block_ids, strict=True):
            _copy(source, self._pool.block_view(block))
        return self.checksums(block_ids)


def _copy(source: memoryview, target: memoryview) -> None:
    """Unlike assignment to a memoryview, this does not hold the GIL."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))

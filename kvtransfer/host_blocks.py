"""A pool's blocks in host memory, as transfers see them."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future

from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Copies, Memory, copies_of
from llm.kv.pool import KvPool

TURN_BYTES, LEAST_BYTES, JOB_BYTES = 1 << 20, 1 << 19, 1 << 23
"""Of one turn, a tenth of a millisecond; least and most of one job: worth waking a thread for, and with others' jobs in between."""


HERE_BYTES = 2 << 20
"""Most that is copied or summed on the event loop: a quarter of a millisecond, less than a thread's waking and its word back take
on a busy machine. With three times as much the other process waits for the core that the loop keeps."""


class HostBlocks:
    """Copies and checksums on the calling thread; neither holds the GIL."""

    def __init__(self, pool: KvPool, copies: Copies | None = None) -> None:
        self._pool = pool
        self._copies = copies or copies_of(pool.layout.block_bytes)
        self.num_per_turn, self.least_per_job, self.num_per_job = (
            max(1, num_bytes // pool.layout.block_bytes) for num_bytes in (TURN_BYTES, LEAST_BYTES, JOB_BYTES)
        )
        self.num_here = HERE_BYTES // pool.layout.block_bytes

    def warm_up(self, threads: Executor, num_threads: int) -> Sequence[Future[None]]:
        return ()

    def view(self, block_id: int) -> memoryview:
        return self._pool.block_view(block_id)

    def checksums(self, block_ids: BlockIds) -> Sums:
        return self._copies.checksums(self._pool.host_bytes, block_ids)

    def fetch(self, memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        """Copies blocks of another pool of the same layout, given as its bytes; their checksums."""
        return self._copies.copy(memory, source_ids, self._pool.host_bytes, block_ids)

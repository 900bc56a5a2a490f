"""A pool's blocks in GPU memory, as transfers see them."""

import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import torch

from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.device_lane import MAX_BLOCKS, Lane
from llm.kv.pool import KvPool, blocks_in

WARM_UP_S = 60.0


class DeviceBlocks:
    """Copies and checksums on the GPU; the calling thread waits for them, without the GIL. Each thread has a stream of its own."""

    least_per_job = num_per_job = num_per_turn = MAX_BLOCKS
    """One launch copies a whole frame's blocks."""
    num_here = 0
    """The event loop never waits for a device."""

    def __init__(self, pool: KvPool) -> None:
        self.device = pool.tensor.device
        self.block_bytes = pool.layout.block_bytes
        self._pool = pool
        self._thread = threading.local()

    def warm_up(self, threads: Executor, num_threads: int) -> Sequence[Future[None]]:
        """Compiles the kernels and makes each thread's stream, which takes a second; nothing of that is left for a busy moment."""
        together, one_at_a_time = threading.Barrier(num_threads), threading.Lock()

        def warm_up() -> None:
            together.wait(WARM_UP_S)
            with one_at_a_time:
                self._lane.warm_up()

        return [threads.submit(warm_up) for _ in range(num_threads)]

    def checksums(self, block_ids: BlockIds) -> Sums:
        return self._lane.checksums(block_ids)

    def fetch(self, memory: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        """Copies blocks of another pool of the same layout, given as its bytes; the checksums of what then lies in ours."""
        return self._lane.fetch(blocks_in(memory, self._pool.layout), source_ids, block_ids)

    def store(self, staged: torch.Tensor, block_ids: BlockIds) -> Sums:
        """Copies rows of `pinned` memory into blocks, one a block; the checksums of what then lies in them."""
        return self._lane.store(staged, block_ids)

    def load(self, block_ids: BlockIds, staged: torch.Tensor) -> None:
        """Copies blocks to rows of `pinned` memory."""
        self._lane.load(block_ids, staged)

    def gather(self, block_ids: BlockIds, row: torch.Tensor) -> None:
        """Copies blocks into a `row`."""
        self._lane.gather(block_ids, row)

    def scatter(self, row: torch.Tensor, block_ids: BlockIds) -> Sums:
        """Copies a `row` into blocks; the checksums of what then lies in them."""
        return self._lane.scatter(row, block_ids)

    def row(self, num_blocks: int) -> torch.Tensor:
        """Blocks on the GPU beside the pool."""
        return torch.empty_like(self._pool.tensor[:num_blocks])

    def pinned(self, num_blocks: int) -> torch.Tensor:
        """Host memory, a row a block, that the GPU can copy to and from while the host does something else."""
        return torch.empty(num_blocks, self.block_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @property
    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._thread, "lane", None)
        if lane is None:
            lane = self._thread.lane = Lane(self._pool.tensor)
        return lane

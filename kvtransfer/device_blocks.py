"""A pool's blocks in GPU memory, as transfers see them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager

import torch

from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.copying import Copying
from llm.kv.device_lane import MAX_BLOCKS, Fetch, Lane
from llm.kv.pool import KvPool, blocks_in

WARM_UP_S = 60.0

HERE_BYTES = 128 << 20
"""Most that the event loop waits for, or begins and looks after: half a millisecond between two GPUs that are linked. Waking a
thread and hearing from it takes as long."""

SLOW_S, AWAY_S = 0.002, 0.25
"""What took longer says that the GPU is busy with other processes, or far. For so long threads have the work then."""


class DeviceBlocks:
    """Copies and checksums on the GPU; the calling thread waits for them, without the GIL. Each thread has a stream of its own."""

    least_per_job = num_per_job = num_per_turn = MAX_BLOCKS
    """One launch copies a whole frame's blocks."""

    def __init__(self, pool: KvPool, clock: Callable[[], float] = time.monotonic) -> None:
        """On the event loop."""
        self.device = pool.tensor.device
        self.block_bytes = pool.layout.block_bytes
        self._pool = pool
        self._clock = clock
        self._home = threading.get_ident()
        self._thread = threading.local()
        self._warming: Sequence[Future[None]] = ()
        self._most_here = min(MAX_BLOCKS, HERE_BYTES // self.block_bytes)
        self._away_until = clock()

    def warm_up(self, threads: Executor, num_threads: int) -> Sequence[Future[None]]:
        """Compiles the kernels and makes each thread's lane, the caller's too; nothing of that is left for a busy moment."""
        assert self._lane is not None
        together, one_at_a_time = threading.Barrier(num_threads), threading.Lock()

        def warm_up() -> None:
            together.wait(WARM_UP_S)
            with one_at_a_time:
                self._lane.warm_up()

        self._warming = [threads.submit(warm_up) for _ in range(num_threads)]
        return self._warming

    @property
    def num_here(self) -> int:
        """None while kernels are compiled, or the GPU was slow a moment ago, or as many fetches as can be are under way."""
        if self._warming and all(job.done() for job in self._warming):
            self._warming = ()
        if self._warming or self._clock() < self._away_until or not self._lane.num_free:
            return 0
        return self._most_here

    def checksums(self, block_ids: BlockIds) -> Sums:
        with self._timed():
            return self._lane.checksums(block_ids)

    def blocks_of(self, memory: torch.Tensor) -> torch.Tensor:
        """The blocks of another pool of the same layout, given as its bytes, for `fetch`. Made before there is a hurry."""
        return blocks_in(memory, self._pool.layout).view(torch.int64)

    def fetch(self, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        """Copies blocks of another pool; the checksums of what came, as it was stored."""
        with self._timed():
            return self._lane.fetch(source, source_ids, block_ids)

    def begin_fetch(self, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> Copying:
        """The same, but only begun, on the event loop, for as many as `num_here`."""
        return _Watched(self._lane.begin_fetch(source, source_ids, block_ids), self._slow)

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
        """Copies a `row` into blocks; the checksums of what was in it, as it was stored."""
        return self._lane.scatter(row, block_ids)

    def row(self, num_blocks: int) -> torch.Tensor:
        """Blocks on the GPU beside the pool."""
        return torch.empty_like(self._pool.tensor[:num_blocks])

    def pinned(self, num_blocks: int) -> torch.Tensor:
        """Host memory, a row a block, that the GPU can copy to and from while the host does something else."""
        return torch.empty(num_blocks, self.block_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Watches how long the event loop waits."""
        began = self._clock()
        yield
        if threading.get_ident() == self._home and self._clock() - began > SLOW_S:
            self._slow()

    def _slow(self) -> None:
        self._away_until = self._clock() + AWAY_S

    @property
    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._thread, "lane", None)
        if lane is None:
            lane = self._thread.lane = Lane(self._pool.tensor)
        return lane


class _Watched:
    """A fetch whose being waited for says that it takes long."""

    def __init__(self, fetch: Fetch, slow: Callable[[], None]) -> None:
        self.event, self.done, self.sums = fetch.event, fetch.done, fetch.sums
        self._fetch, self._slow = fetch, slow

    def wait(self) -> None:
        self._slow()
        self._fetch.wait()

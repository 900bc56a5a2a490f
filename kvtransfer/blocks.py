"""How transfers reach a pool's blocks, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Protocol

from kvtransfer.host_blocks import HostBlocks
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.pool import KvPool

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks


class Blocks(Protocol):
    """Used on threads. `least_per_job`, `num_per_job`: least and most blocks of one job; `num_per_turn`: those between two looks at
    whether to go on; `num_here`: most that are done sooner on the event loop than by a thread."""

    @property
    def least_per_job(self) -> int: ...

    @property
    def num_per_job(self) -> int: ...

    @property
    def num_per_turn(self) -> int: ...

    @property
    def num_here(self) -> int: ...

    def checksums(self, block_ids: BlockIds) -> Sums: ...

    def warm_up(self, threads: Executor, num_threads: int) -> Sequence[Future[None]]:
        """Has the threads that will use the blocks make ready; returns at once, with what is to be waited for before serving."""


MakeBlocks = Callable[[KvPool], "HostBlocks | DeviceBlocks"]


def blocks_of(pool: KvPool) -> HostBlocks | DeviceBlocks:
    """The blocks of a pool that stays open."""
    if not pool.on_device:
        return HostBlocks(pool)
    from kvtransfer.device_blocks import DeviceBlocks

    return DeviceBlocks(pool)


def shares(first: int, last: int, num_threads: int, blocks: Blocks) -> Iterator[tuple[int, int]]:
    """A run of blocks as jobs (first block, number of blocks), in equal parts for the threads as far as the limits allow."""
    size = min(max(-(-(last - first) // num_threads), blocks.least_per_job), blocks.num_per_job)
    for start in range(first, last, size):
        yield start, min(size, last - start)

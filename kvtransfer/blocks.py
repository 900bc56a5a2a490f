"""How transfers reach a pool's blocks, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

from kvtransfer.host_blocks import HostBlocks
from llm.kv.pool import KvPool

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks


class Blocks(Protocol):
    """Used on threads. `num_per_job`: blocks of one job; `num_per_turn`: those between two looks at whether to go on."""

    @property
    def num_per_job(self) -> int: ...

    @property
    def num_per_turn(self) -> int: ...

    def checksums(self, block_ids: Sequence[int]) -> list[int]: ...

    def warm_up(self, threads: Executor, num_threads: int) -> None:
        """Has the threads that will use the blocks make ready; returns at once."""


def blocks_of(pool: KvPool) -> HostBlocks | DeviceBlocks:
    """The blocks of a pool that stays open."""
    if not pool.on_device:
        return HostBlocks(pool)
    from kvtransfer.device_blocks import DeviceBlocks

    return DeviceBlocks(pool)

"""Between a pool and a socket: where blocks are received, and from where they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvtransfer.host_blocks import HostBlocks
from kvtransfer.intake import Arrival
from llm.kv.block_arrays import BlockIds, Sums

if TYPE_CHECKING:
    from kvtransfer.device_blocks import DeviceBlocks

SLOT_BYTES = 1 << 23
"""Large enough for the copy between host and GPU to run at full speed, small enough for the first to be soon on its way."""

NUM_SLOTS = 8


@dataclass(frozen=True)
class Room:
    """Where the bytes of some blocks are received. `bring(first, last)`: on a thread, or `here`, on the event loop, puts those of
    them in place and returns the checksums of what then lies there. To be released once that is done, or if it never is."""

    views: Sequence[memoryview]
    bring: Arrival
    release: Callable[[], None]
    here: bool = False


class Stage(Protocol):
    """What the tcp transport asks of a pool."""

    @property
    def num_per_room(self) -> int: ...

    async def room(self, block_ids: BlockIds) -> Room:
        """For at most `num_per_room` blocks."""

    def lend(self, block_ids: BlockIds) -> AsyncGenerator[Sequence[memoryview], None]:
        """The blocks' bytes in order, a run at a time, each valid until the next is asked for. The caller closes the generator."""

    async def close(self) -> None:
        """Nothing may be received or sent any more."""


class HostStage:
    """Blocks in host memory are sent and received where they lie. What came is summed at once, while it is in the processor's cache
    and the producer sends on."""

    def __init__(self, blocks: HostBlocks) -> None:
        self._blocks = blocks
        self.num_per_room = blocks.num_here or blocks.num_per_job

    async def room(self, block_ids: BlockIds) -> Room:
        def bring(first: int, last: int) -> Sums:
            return self._blocks.checksums(block_ids[first:last])

        views = [self._blocks.view(block) for block in block_ids.tolist()]
        return Room(views, bring, lambda: None, here=len(views) <= self._blocks.num_here)

    async def lend(self, block_ids: BlockIds) -> AsyncGenerator[Sequence[memoryview], None]:
        yield [self._blocks.view(block) for block in block_ids.tolist()]

    async def close(self) -> None:
        pass


class DeviceStage:
    """Blocks of a GPU pass through pinned host memory: one run is copied while another is on the wire."""

    def __init__(self, blocks: DeviceBlocks, num_slots: int = NUM_SLOTS) -> None:
        self._blocks = blocks
        self.num_per_room = max(1, min(blocks.num_per_job, SLOT_BYTES // blocks.block_bytes))
        self._threads = ThreadPoolExecutor(2, "kv-staging")
        self._slots: asyncio.Queue[torch.Tensor] = asyncio.Queue()
        self._num_unmade = num_slots

    async def room(self, block_ids: BlockIds) -> Room:
        slot = await self._take()
        rows = slot[: len(block_ids)]

        def bring(first: int, last: int) -> Sums:
            return self._blocks.store(rows[first:last], block_ids[first:last])

        return Room(_views(rows), bring, lambda: self._slots.put_nowait(slot))

    async def lend(self, block_ids: BlockIds) -> AsyncGenerator[Sequence[memoryview], None]:
        size = self.num_per_room
        waiting = [block_ids[start : start + size] for start in range(0, len(block_ids), size)]
        loading = self._start(waiting)
        try:
            while loading is not None:
                slot, count = await loading
                loading = self._start(waiting)
                try:
                    yield _views(slot[:count])
                finally:
                    self._slots.put_nowait(slot)
        finally:
            if loading is not None and not loading.cancel() and not loading.cancelled() and loading.exception() is None:
                self._slots.put_nowait(loading.result()[0])

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def _start(self, waiting: list[BlockIds]) -> asyncio.Task[tuple[torch.Tensor, int]] | None:
        return asyncio.create_task(self._load(waiting.pop(0))) if waiting else None

    async def _load(self, block_ids: BlockIds) -> tuple[torch.Tensor, int]:
        """A slot that holds the blocks, and how many; the caller gives it back. If this is cancelled, it goes back by itself."""
        slot = await self._take()
        job = asyncio.get_running_loop().run_in_executor(self._threads, self._blocks.load, block_ids, slot[: len(block_ids)])
        try:
            await asyncio.shield(job)
        except BaseException:
            job.add_done_callback(lambda _: self._slots.put_nowait(slot))
            raise
        return slot, len(block_ids)

    async def _take(self) -> torch.Tensor:
        """Pinning takes a millisecond, so slots are made only as they are needed."""
        if self._slots.empty() and self._num_unmade:
            self._num_unmade -= 1
            return self._blocks.pinned(self.num_per_room)
        return await self._slots.get()


def _views(rows: torch.Tensor) -> list[memoryview]:
    return [memoryview(row.numpy()) for row in rows]


def stage_of(blocks: HostBlocks | DeviceBlocks) -> HostStage | DeviceStage:
    return HostStage(blocks) if isinstance(blocks, HostBlocks) else DeviceStage(blocks)

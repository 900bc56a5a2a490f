"""What the readers of a ticket may be told so far."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from kvtransfer.blocks import Blocks
from kvtransfer.frames import MAX_BLOCKS_PER_FRAME, BlocksFrame, EndFrame, Frame, WaitFrame
from kvtransfer.ledger import Entry, not_found
from kvtransfer.threads import WatchedThreads
from tandem.errors import TandemError
from tandem.progress import Work

logger = logging.getLogger(__name__)

CHECKSUM_THREADS = 2


class Outbox:
    """One ticket's readiness, as its readers may see it: a block is told only once its checksum is known. On the event loop."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.num_submitted = 0
        """Blocks whose checksums have been asked for; changed by the Checksummer."""
        self.silenced: TandemError | None = None
        """What the present readers end with, if their consumer has fallen silent."""
        self._checksums: list[int | None] = [None] * len(entry.block_ids)
        self._num_told = 0
        self._changed = asyncio.Event()

    @property
    def num_told(self) -> int:
        """Blocks that readers may know of."""
        return self._num_told

    def notify(self) -> None:
        """Wakes everyone who waits; the entry, or what is known of it, has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def add(self, first_block_index: int, checksums: Sequence[int]) -> None:
        """Checksums may come in any order; readers hear of blocks in order, without gap."""
        self._checksums[first_block_index : first_block_index + len(checksums)] = checksums
        while self._num_told < len(self._checksums) and self._checksums[self._num_told] is not None:
            self._num_told += 1
        self.notify()

    async def next_frame(self, index: int, heartbeat_s: float | None) -> Frame:
        """What a reader that knows the blocks before `index` is told next; a WaitFrame after `heartbeat_s` without news.

        Raises the error that ended the ticket.
        """
        while True:
            frame = self._frame_from(index)
            if frame is not None:
                return frame
            try:
                async with asyncio.timeout(heartbeat_s):
                    await self._changed.wait()
            except TimeoutError:
                return WaitFrame(self.entry.epoch)

    def _frame_from(self, index: int) -> Frame | None:
        entry = self.entry
        if entry.error is not None:
            raise entry.error
        if self.silenced is not None:
            raise self.silenced
        if entry.state.final:
            raise not_found(entry.ticket_id, entry.epoch, entry.state.value)
        if index < self._num_told:
            known = self._checksums[index : min(self._num_told, index + MAX_BLOCKS_PER_FRAME)]
            return BlocksFrame(entry.epoch, index, tuple(checksum for checksum in known if checksum is not None))
        if entry.first_token_id is not None and index == len(self._checksums):
            return EndFrame(entry.epoch, entry.first_token_id)
        return None


class Checksummer:
    """Takes the checksums of ready blocks in threads.

    A job may outlive its ticket; it then reads blocks that belong to another by now, and nobody hears of the result.
    """

    def __init__(self, blocks: Blocks, failed: Callable[[Outbox, BaseException], None]) -> None:
        self._blocks = blocks
        self._failed = failed
        self._threads = WatchedThreads(CHECKSUM_THREADS, "kv-checksum")
        blocks.warm_up(self._threads, CHECKSUM_THREADS)

    def submit(self, outbox: Outbox) -> None:
        """Sees to the blocks that have become ready since the last call."""
        loop, ready = asyncio.get_running_loop(), outbox.entry.num_ready_blocks
        for first in range(outbox.num_submitted, ready, self._blocks.num_per_job):
            block_ids = outbox.entry.block_ids[first : min(first + self._blocks.num_per_job, ready)]
            job = self._threads.submit(self._blocks.checksums, block_ids)
            report = partial(self._done, outbox, first)
            job.add_done_callback(partial(_on_loop, loop, report))
        outbox.num_submitted = ready

    def work(self) -> Work:
        """Whether checksums are being taken, and how many jobs are done."""
        return self._threads.work()

    async def close(self) -> None:
        """Waits for the jobs under way."""
        await asyncio.to_thread(self._threads.shutdown)

    def _done(self, outbox: Outbox, first_block_index: int, job: Future[list[int]]) -> None:
        error = job.exception()
        if error is None:
            outbox.add(first_block_index, job.result())
        else:
            self._failed(outbox, error)


def _on_loop(loop: asyncio.AbstractEventLoop, report: Callable[[Future[list[int]]], None], job: Future[list[int]]) -> None:
    loop.call_soon_threadsafe(report, job)

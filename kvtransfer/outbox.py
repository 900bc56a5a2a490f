"""What the readers of a ticket may be told so far."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtransfer.blocks import Blocks, shares
from kvtransfer.frames import MAX_ITEMS_PER_FRAME, NewsFrame
from kvtransfer.ledger import Entry, not_found
from kvtransfer.threads import WatchedThreads
from llm.kv.block_arrays import Sums
from tandem.errors import TandemError
from tandem.progress import Work

logger = logging.getLogger(__name__)

CHECKSUM_THREADS = 2


@dataclass
class Reader:
    """What one stream has been told: so many blocks and checksums from the ticket's first on, and whether the first token."""

    num_blocks: int
    num_checksums: int
    knows_token: bool = False

    def knows_all_of(self, entry: Entry) -> bool:
        return self.knows_token and self.num_blocks == self.num_checksums == len(entry.block_ids)

    def note(self, frame: NewsFrame) -> None:
        self.num_blocks += frame.num_blocks
        self.num_checksums += len(frame.checksums)
        self.knows_token |= frame.first_token_id is not None


class Outbox:
    """One ticket's readiness, as its readers may see it. On the event loop."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.block_ids = np.asarray(entry.block_ids, np.int32)
        self.num_submitted = 0
        """Blocks whose checksums have been asked for; changed by the Checksummer."""
        self.silenced: TandemError | None = None
        """What the present readers end with, if their consumer has fallen silent."""
        self._checksums = np.zeros(len(entry.block_ids), np.uint64)
        self._known = np.zeros(len(entry.block_ids) + 1, np.bool_)  # the last never is
        self._num_checksums = 0
        self._changed = asyncio.Event()

    @property
    def num_checksums(self) -> int:
        """Blocks from the first on whose checksums readers may know."""
        return self._num_checksums

    def notify(self) -> None:
        """Wakes everyone who waits; the entry, or what is known of it, has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def add(self, first_block_index: int, checksums: Sums) -> None:
        """Checksums may come in any order; readers hear of them in order, without gap."""
        end = first_block_index + len(checksums)
        self._checksums[first_block_index:end] = checksums
        self._known[first_block_index:end] = True
        self._num_checksums += int(self._known[self._num_checksums :].argmin())
        self.notify()

    async def next_frame(self, reader: Reader, heartbeat_s: float | None) -> NewsFrame:
        """What a reader is told next; a frame without news after `heartbeat_s`. Raises the error that ended the ticket."""
        while True:
            frame = self._news_for(reader)
            if frame.num_blocks or frame.checksums or frame.first_token_id is not None:
                return frame
            try:
                async with asyncio.timeout(heartbeat_s):
                    await self._changed.wait()
            except TimeoutError:
                return frame

    def _news_for(self, reader: Reader) -> NewsFrame:
        entry, told = self.entry, reader.num_checksums
        if entry.error is not None:
            raise entry.error
        if self.silenced is not None:
            raise self.silenced
        if entry.state.final:
            raise not_found(entry.ticket_id, entry.epoch, entry.state.value)
        num_blocks = min(max(0, entry.num_ready_blocks - reader.num_blocks), MAX_ITEMS_PER_FRAME)
        # No checksum comes before its block: a frame holds what belongs together.
        end = min(self._num_checksums, told + MAX_ITEMS_PER_FRAME, reader.num_blocks + num_blocks)
        checksums = tuple(self._checksums[told:end].tolist())
        token = None if reader.knows_token else entry.first_token_id
        return NewsFrame(entry.epoch, reader.num_blocks, num_blocks, told, checksums, token)


class Checksummer:
    """Takes the checksums of ready blocks: of few at once, of more in threads.

    A job may outlive its ticket; it then reads blocks that belong to another by now, and nobody hears of the result.
    """

    def __init__(self, blocks: Blocks, failed: Callable[[Outbox, BaseException], None]) -> None:
        self._blocks = blocks
        self._failed = failed
        self._threads = WatchedThreads(CHECKSUM_THREADS, "kv-checksum")
        self._warming = blocks.warm_up(self._threads, CHECKSUM_THREADS)

    async def warm(self) -> None:
        """Returns once the threads are ready for work: what comes before would look as if they stood still."""
        await asyncio.gather(*map(asyncio.wrap_future, self._warming))

    def submit(self, outbox: Outbox) -> None:
        """Sees to the blocks that have become ready since the last call."""
        loop, start, ready = asyncio.get_running_loop(), outbox.num_submitted, outbox.entry.num_ready_blocks
        outbox.num_submitted = ready
        if ready - start <= self._blocks.num_here:
            self._take_here(outbox, start, ready)
            return
        # In few jobs, though there are more threads: each costs a frame, and consumers copy meanwhile.
        for first, count in shares(start, ready, 1, self._blocks):
            job = self._threads.submit(self._blocks.checksums, outbox.block_ids[first : first + count])
            report = partial(self._done, outbox, first)
            job.add_done_callback(partial(_on_loop, loop, report))

    def work(self) -> Work:
        """Whether checksums are being taken, and how many jobs are done."""
        return self._threads.work()

    async def close(self) -> None:
        """Waits for the jobs under way."""
        await asyncio.to_thread(self._threads.shutdown)

    def _take_here(self, outbox: Outbox, first: int, ready: int) -> None:
        if first == ready or outbox.entry.state.final:
            return
        try:
            outbox.add(first, self._blocks.checksums(outbox.block_ids[first:ready]))
        except Exception as error:
            self._failed(outbox, error)

    def _done(self, outbox: Outbox, first_block_index: int, job: Future[Sums]) -> None:
        error = job.exception()
        if error is None:
            outbox.add(first_block_index, job.result())
        else:
            self._failed(outbox, error)


def _on_loop(loop: asyncio.AbstractEventLoop, report: Callable[[Future[Sums]], None], job: Future[Sums]) -> None:
    loop.call_soon_threadsafe(report, job)

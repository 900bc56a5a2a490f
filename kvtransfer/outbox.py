"""What the readers of a ticket may be told so far."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
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
        self._readings: set[Reading] = set()

    @property
    def num_checksums(self) -> int:
        """Blocks from the first on whose checksums readers may know."""
        return self._num_checksums

    @contextmanager
    def reading(self, first: int) -> Iterator["Reading"]:
        """A reader, who is told until the context is left."""
        reading = Reading(self, first)
        self._readings.add(reading)
        try:
            yield reading
        finally:
            self._readings.remove(reading)

    def checksums(self, first: int, last: int) -> tuple[int, ...]:
        """Those of the blocks from the first index up to the last; readers may know them."""
        return tuple(self._checksums[first:last].tolist()) if first < last else ()

    def notify(self) -> None:
        """Tells every reader that the entry, or what is known of it, has changed."""
        for reading in tuple(self._readings):
            reading.heard()

    def add(self, first_block_index: int, checksums: Sums) -> None:
        """Checksums may come in any order; readers hear of them in order, without gap."""
        end = first_block_index + len(checksums)
        self._checksums[first_block_index:end] = checksums
        self._known[first_block_index:end] = True
        self._num_checksums += int(self._known[self._num_checksums :].argmin())
        self.notify()


class Reading:
    """What one stream is told of a ticket, from its `first`th block and checksum on, and where it stands."""

    def __init__(self, outbox: Outbox, first: int) -> None:
        self.heard: Callable[[], None] = _nothing
        """Called when there may be news, by whoever brings them."""
        self._outbox = outbox
        self._num_blocks = self._num_checksums = first
        self._knows_token = False

    @property
    def complete(self) -> bool:
        """Whether everything was told."""
        return self._knows_token and self._num_blocks == self._num_checksums == len(self._outbox.block_ids)

    def news(self) -> NewsFrame:
        """What is to be told next, which may be nothing. Raises the error that ended the ticket."""
        outbox, entry, told = self._outbox, self._outbox.entry, self._num_checksums
        if entry.error is not None:
            raise entry.error
        if outbox.silenced is not None:
            raise outbox.silenced
        if entry.state.final:
            raise not_found(entry.ticket_id, entry.epoch, entry.state.value)
        num_blocks = min(max(0, entry.num_ready_blocks - self._num_blocks), MAX_ITEMS_PER_FRAME)
        # No checksum comes before its block: a frame holds what belongs together.
        end = min(outbox.num_checksums, told + MAX_ITEMS_PER_FRAME, self._num_blocks + num_blocks)
        token = None if self._knows_token else entry.first_token_id
        return NewsFrame(entry.epoch, self._num_blocks, num_blocks, told, outbox.checksums(told, end), token)

    def told(self, frame: NewsFrame) -> None:
        self._num_blocks += frame.num_blocks
        self._num_checksums += len(frame.checksums)
        self._knows_token |= frame.first_token_id is not None


def _nothing() -> None:
    """Nobody listens."""


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

"""How pulled blocks arrive: the frames that tell of them, and the threads, or the device, that copy them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import aclosing
from dataclasses import dataclass, replace

from kvtransfer.blocks import Blocks, shares
from kvtransfer.destination import Destination
from kvtransfer.frames import NewsFrame
from kvtransfer.pull_state import InterruptedPullError
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import Sums
from llm.kv.copying import Copying, Event

Arrival = Callable[[int, int], Sums]
"""Puts the ticket's blocks from the first index up to the second in place, on a thread, and returns the checksums of what then lies
there."""

Begin = Callable[[int, int], Copying]
"""Has a device begin the same."""

LOOKS_S = 0.002
"""How long the event loop looks again and again whether a device is done, between all else that it does: a thread that waits is
heard of later."""


class Sequencer:
    """Checks one stream of frames: of the right epoch, in order, without gap, and only within the ticket."""

    def __init__(self, epoch: int, first_block_index: int, num_blocks: int) -> None:
        self._epoch = epoch
        self._num_blocks = num_blocks
        self.next_block = first_block_index
        self.next_checksum = first_block_index
        self.first_token_id: int | None = None

    @property
    def complete(self) -> bool:
        """Whether everything was told."""
        return self.coming_token is not None and self.next_checksum == self._num_blocks

    @property
    def coming_token(self) -> int | None:
        """The first token once all blocks were told, too."""
        return self.first_token_id if self.next_block == self._num_blocks else None

    def accept(self, frame: NewsFrame) -> NewsFrame:
        """What of the frame is new. Raises InterruptedPullError."""
        if frame.epoch != self._epoch:
            raise InterruptedPullError(f"a frame of epoch {frame.epoch} in a pull of epoch {self._epoch}")
        if self.first_token_id not in (None, frame.first_token_id) and frame.first_token_id is not None:
            raise InterruptedPullError("two first tokens for one prompt")
        known_blocks = self._known(frame.first_block_index, frame.num_blocks, self.next_block, self._num_blocks)
        next_block = self.next_block + frame.num_blocks - known_blocks
        known_checksums = self._known(frame.first_checksum_index, len(frame.checksums), self.next_checksum, next_block)
        new = frame
        if known_blocks or known_checksums:
            new = replace(
                frame,
                first_block_index=self.next_block,
                num_blocks=frame.num_blocks - known_blocks,
                first_checksum_index=self.next_checksum,
                checksums=frame.checksums[known_checksums:],
            )
        self.next_block, self.next_checksum = next_block, self.next_checksum + len(new.checksums)
        self.first_token_id = self.first_token_id if frame.first_token_id is None else frame.first_token_id
        return new

    @staticmethod
    def _known(first: int, count: int, expected: int, limit: int) -> int:
        """How many of a run, from its first on, came before. A run of none says nothing."""
        if count and (first > expected or first + count > limit):
            raise InterruptedPullError(f"a frame of {first} to {first + count} where {expected} was next, of {limit}")
        return min(count, expected - first) if count else 0


class Crew:
    """Threads and a device at work on one destination, as a context. On the event loop but for the work itself.

    The context is left, in whatever way, only when none of them is at the destination's memory any more, so that its owner may
    reuse the blocks at once. Being cancelled makes the threads stop at the next turn (well under a millisecond) but is not hurried
    by further cancels.
    """

    def __init__(self, destination: Destination, threads: Executor, blocks: Blocks, num_threads: int) -> None:
        self._blocks = blocks
        self._destination = destination
        self._threads = threads
        self._num_threads = num_threads
        self._loop = asyncio.get_running_loop()
        self._num_running = 0
        self._under_way: list[Copying] = []
        """What of that a device does."""
        self._has_begun = False
        self._landing: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._stopped = False

    async def __aenter__(self) -> "Crew":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        cancelled: asyncio.CancelledError | None = None
        while self._num_running:
            try:
                await self._next_landing()
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def start(self, first: int, num_blocks: int, arrive: Arrival, begin: Begin | None = None) -> None:
        """Has a run of blocks brought in and verified. Few are at once, or by the device if it can `begin`; more are shared among
        threads, and so are few that come while threads are at work: they overlap.

        Raises what `check` does of those that were.
        """
        if 0 < num_blocks <= self._blocks.num_here and self._num_running == len(self._under_way):
            if begin is None:
                self.take_in_here(first, num_blocks, arrive)
            else:
                self._look_after(first, begin(first, first + num_blocks))
            return
        for start, count in shares(first, first + num_blocks, self._num_threads, self._blocks):
            self.submit(start, count, arrive)

    def take_in_here(self, first: int, num_blocks: int, arrive: Arrival) -> None:
        """The same on the event loop, for what is done sooner than a thread is woken. Raises DamagedBlockError, or its failure."""
        self._destination.arrived(first, arrive(first, first + num_blocks))

    def submit(self, first: int, num_blocks: int, arrive: Arrival) -> asyncio.Future[None]:
        """The same as one job of a thread. The future is done when the job is, however it ended; `check` tells."""
        landed: asyncio.Future[None] = self._loop.create_future()
        job = self._threads.submit(self._take_in, first, num_blocks, arrive)
        self._num_running += 1
        job.add_done_callback(lambda job: self._loop.call_soon_threadsafe(self._land, first, job, landed))
        return landed

    def events(self) -> Sequence[Event] | None:
        """After these all blocks that were started with are in place. None while threads are at work, or if only they were."""
        if not self._has_begun or self._num_running > len(self._under_way):
            return None
        return [copying.event for copying in self._under_way if copying.event is not None]

    def check(self) -> None:
        """Raises DamagedBlockError if a block that came was one, or what a job failed with."""
        if self._error is not None:
            raise self._error

    async def join(self) -> None:
        """Returns once every job is done. Raises what `check` does, as soon as it does."""
        self.check()
        while self._num_running:
            await self._next_landing()
            self.check()

    def _look_after(self, first: int, copying: Copying) -> None:
        """Takes in what a device copies, when that is done."""
        self._has_begun = True
        self._num_running += 1
        self._under_way.append(copying)

        def land(job: asyncio.Task[list[Sums]]) -> None:
            self._under_way.remove(copying)
            self._land(first, job)

        self._loop.create_task(self._copied(copying)).add_done_callback(land)

    async def _copied(self, copying: Copying) -> list[Sums]:
        """On to its end if the loop ends, too: blocks are reused after that."""
        until = self._loop.time() + LOOKS_S
        try:
            while not copying.done():
                if self._loop.time() < until:
                    await asyncio.sleep(0)
                else:
                    await asyncio.wrap_future(self._threads.submit(copying.wait))
        except asyncio.CancelledError:
            copying.wait()
            raise
        return [copying.sums()]

    def _take_in(self, first: int, num_blocks: int, arrive: Arrival) -> list[Sums]:
        found = []
        for start in range(first, first + num_blocks, self._blocks.num_per_turn):
            if self._stopped:
                break
            found.append(arrive(start, min(start + self._blocks.num_per_turn, first + num_blocks)))
        return found

    def _land(
        self, first: int, job: Future[list[Sums]] | asyncio.Task[list[Sums]], landed: asyncio.Future[None] | None = None
    ) -> None:
        self._num_running -= 1
        try:
            for sums in job.result():
                self._destination.arrived(first, sums)
                first += len(sums)
        except (Exception, asyncio.CancelledError) as error:
            self._error = self._error or error
        for waited in (landed, self._landing):
            if waited is not None and not waited.done():
                waited.set_result(None)

    async def _next_landing(self) -> None:
        self._landing = self._loop.create_future()
        await self._landing


@dataclass(frozen=True)
class Pull:
    """One attempt at a ticket's blocks."""

    ticket: KvTicket
    destination: Destination
    crew: Crew

    def tell_coming(self, first_token_id: int) -> None:
        """All blocks were told."""
        recipient, events = self.destination.recipient, self.crew.events()
        if recipient is not None and events is not None:
            recipient.coming(first_token_id, events)

    def sequencer(self) -> Sequencer:
        """For frames that begin with the first block that is not verified."""
        return Sequencer(self.ticket.epoch, self.destination.state.num_verified, len(self.ticket.block_ids))


Bring = Callable[[NewsFrame, NewsFrame], Awaitable[None]]
"""Sees to the blocks of a frame; given also what of it is new."""


async def follow(frames: AsyncGenerator[NewsFrame, None], pull: Pull, bring: Bring) -> int:
    """Has the blocks brought in that `frames` tell of, from the first that is not verified on, until everything was told.

    Returns the first token; the crew may still be at work then.

    Raises InterruptedPullError, DamagedBlockError, or what `frames` and `bring` raise.
    """
    sequencer, destination = pull.sequencer(), pull.destination
    async with aclosing(frames):
        async for frame in frames:
            pull.crew.check()
            new = sequencer.accept(frame)
            if frame.num_blocks:
                destination.state.filling()
                await bring(frame, new)
            if sequencer.coming_token is not None:
                pull.tell_coming(sequencer.coming_token)
            if new.checksums:
                destination.told(new.first_checksum_index, new.checksums)
            if sequencer.complete:
                assert sequencer.first_token_id is not None
                return sequencer.first_token_id
    raise InterruptedPullError("the producer's stream ended early")


async def settled(jobs: Sequence[asyncio.Future[None]]) -> None:
    """Returns when all jobs are done, whatever became of them; a cancel meanwhile is raised after that."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [job for job in jobs if not job.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    for job in jobs:
        job.exception()  # whoever wanted to know has asked by now
    if cancelled is not None:
        raise cancelled

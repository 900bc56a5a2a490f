"""Where pulled blocks arrive, and the threads that copy and verify them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass

from kvtransfer.blocks import Blocks
from kvtransfer.frames import BlocksFrame, EndFrame, Frame
from kvtransfer.pull_state import DamagedBlockError, InterruptedPullError, PullState
from kvtransfer.ticket import KvTicket

Arrival = Callable[[int, int], Sequence[int]]
"""Puts the ticket's blocks from the first index up to the second in place, on a thread, and returns the checksums of what then lies
there."""


class Destination:
    """The blocks of the own pool that one ticket is pulled into; `state` knows which of them hold verified content."""

    def __init__(self, block_ids: Sequence[int], state: PullState) -> None:
        self.block_ids = block_ids
        self.state = state

    def verify(self, first: int, found: Sequence[int], announced: Sequence[int]) -> None:
        """On any thread, given the checksums of blocks that are in place. Raises DamagedBlockError."""
        for index, (here, there) in enumerate(zip(found, announced, strict=True), first):
            if here != there:
                raise DamagedBlockError(index)
            self.state.verified(index)


class Sequencer:
    """Checks one stream of frames: of the right epoch, in order, without gap, and only within the ticket."""

    def __init__(self, epoch: int, first_block_index: int, num_blocks: int) -> None:
        self._epoch = epoch
        self._num_blocks = num_blocks
        self.next_index = first_block_index

    def accept(self, frame: BlocksFrame) -> int:
        """How many of the frame's blocks, from its first on, are known already. Raises InterruptedPullError."""
        self._check_epoch(frame.epoch)
        end = frame.first_block_index + len(frame.checksums)
        if frame.first_block_index > self.next_index or end > self._num_blocks:
            raise InterruptedPullError(f"frame of blocks {frame.first_block_index} to {end} where {self.next_index} was next")
        num_known = min(self.next_index, end) - frame.first_block_index
        self.next_index = max(self.next_index, end)
        return num_known

    def end(self, epoch: int) -> None:
        """Raises InterruptedPullError if blocks are missing."""
        self._check_epoch(epoch)
        if self.next_index != self._num_blocks:
            raise InterruptedPullError(f"the end came after {self.next_index} of {self._num_blocks} blocks")

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise InterruptedPullError(f"a frame of epoch {epoch} in a pull of epoch {self._epoch}")


class Crew:
    """Threads at work on one destination, as a context.

    The context is left, in whatever way, only when no thread is at the destination's memory any more, so that its owner may reuse
    the blocks at once. Being cancelled makes the threads stop at the next turn (well under a millisecond) but is not hurried by
    further cancels.
    """

    def __init__(self, destination: Destination, threads: Executor, blocks: Blocks) -> None:
        self._blocks = blocks
        self._destination = destination
        self._threads = threads
        self._jobs: list[asyncio.Future[None]] = []
        self._stopped = False

    async def __aenter__(self) -> "Crew":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await settled(self._jobs)

    def start(self, first_block_index: int, checksums: Sequence[int], arrive: Arrival) -> None:
        """Has a run of blocks brought in and verified. Split over threads."""
        for start in range(0, len(checksums), self._blocks.num_per_job):
            self.submit(first_block_index + start, checksums[start : start + self._blocks.num_per_job], arrive)

    def submit(self, first_block_index: int, checksums: Sequence[int], arrive: Arrival) -> asyncio.Future[None]:
        """The same as one job, which is returned."""
        job = asyncio.wrap_future(self._threads.submit(self._take_in, first_block_index, checksums, arrive))
        self._jobs.append(job)
        return job

    def check(self) -> None:
        """Raises DamagedBlockError if a finished job found one."""
        for job in self._jobs:
            if job.done():
                job.result()
        self._jobs = [job for job in self._jobs if not job.done()]

    async def join(self) -> None:
        """Returns once every block is verified. Raises DamagedBlockError."""
        for job in self._jobs:
            await asyncio.wait([job])
        self.check()

    def _take_in(self, first: int, checksums: Sequence[int], arrive: Arrival) -> None:
        for start in range(0, len(checksums), self._blocks.num_per_turn):
            if self._stopped:
                return
            part = checksums[start : start + self._blocks.num_per_turn]
            found = arrive(first + start, first + start + len(part))
            self._destination.verify(first + start, found, part)


@dataclass(frozen=True)
class Pull:
    """One attempt at a ticket's blocks."""

    ticket: KvTicket
    destination: Destination
    crew: Crew

    def sequencer(self) -> Sequencer:
        """For frames that begin with the first block that is not verified."""
        return Sequencer(self.ticket.epoch, self.destination.state.num_verified, len(self.ticket.block_ids))


async def follow(frames: AsyncGenerator[Frame, None], pull: Pull, arrive: Arrival) -> int:
    """Has the crew bring in the blocks that `frames` tell of, from the first that is not verified on; returns the first token.

    Raises InterruptedPullError, DamagedBlockError, or what `frames` raises.
    """
    sequencer, crew = pull.sequencer(), pull.crew
    async with aclosing(frames):
        async for frame in frames:
            crew.check()
            match frame:
                case BlocksFrame(_, first, checksums):
                    pull.destination.state.filling()
                    num_known = sequencer.accept(frame)
                    crew.start(first + num_known, checksums[num_known:], arrive)
                case EndFrame(epoch, first_token_id):
                    sequencer.end(epoch)
                    return first_token_id
    raise InterruptedPullError("the producer's stream ended without its last frame")


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

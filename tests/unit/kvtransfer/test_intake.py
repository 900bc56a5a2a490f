"""Arriving blocks: order, verification, and threads that are gone when the pull is."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from kvtransfer.checksum import block_checksum
from kvtransfer.frames import BlocksFrame
from kvtransfer.intake import Crew, Destination, Sequencer
from kvtransfer.pull_state import DamagedBlockError, InterruptedPullError, PullState

SOURCES = [memoryview(bytes([index]) * 64) for index in range(4)]
CHECKSUMS = [block_checksum(source) for source in SOURCES]


class Blocks:
    """Four blocks that are taken in one at a time."""

    num_per_job, num_per_turn = 4, 1

    def __init__(self) -> None:
        self.content = [bytearray(64) for _ in SOURCES]

    def warm_up(self, threads: Executor, num_threads: int) -> None:
        pass

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        return [block_checksum(bytes(self.content[block])) for block in block_ids]

    def fetch(self, first: int, last: int) -> list[int]:
        for index in range(first, last):
            self.content[index][:] = SOURCES[index]
        return self.checksums(range(first, last))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def destination() -> Destination:
    return Destination(range(len(SOURCES)), PullState("t", 1, len(SOURCES), lambda: 1.0))


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


def test_frames_in_order_are_new() -> None:
    sequencer = Sequencer(1, 0, 4)
    assert [sequencer.accept(BlocksFrame(1, first, (0, 0))) for first in (0, 2)] == [0, 0]
    sequencer.end(1)


def test_a_repeated_frame_is_known() -> None:
    sequencer = Sequencer(1, 0, 4)
    sequencer.accept(BlocksFrame(1, 0, (0, 0)))
    assert sequencer.accept(BlocksFrame(1, 0, (0, 0))) == 2
    assert sequencer.accept(BlocksFrame(1, 1, (0, 0, 0))) == 1
    assert sequencer.next_index == 4


@pytest.mark.parametrize("frame", [BlocksFrame(1, 1, (0,)), BlocksFrame(1, 0, (0,) * 5), BlocksFrame(2, 0, (0,))])
def test_gaps_excess_and_other_epochs_end_the_stream(frame: BlocksFrame) -> None:
    with pytest.raises(InterruptedPullError):
        Sequencer(1, 0, 4).accept(frame)


def test_an_early_or_foreign_end_is_no_end() -> None:
    for sequencer, epoch in ((Sequencer(1, 3, 4), 1), (Sequencer(1, 4, 4), 2)):
        with pytest.raises(InterruptedPullError):
            sequencer.end(epoch)


async def test_blocks_are_copied_and_verified(destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks) -> None:
    async with Crew(destination, threads, blocks) as crew:
        crew.start(0, CHECKSUMS[:3], blocks.fetch)
        crew.start(3, CHECKSUMS[3:], blocks.fetch)
        await crew.join()
    assert destination.state.num_verified == 4
    assert [bytes(content) for content in blocks.content] == [bytes(source) for source in SOURCES]


async def test_a_damaged_block_is_named_and_not_counted(
    destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    with pytest.raises(DamagedBlockError) as caught:
        async with Crew(destination, threads, blocks) as crew:
            crew.start(0, [*CHECKSUMS[:2], 1, CHECKSUMS[3]], blocks.fetch)
            await crew.join()
    assert (caught.value.index, destination.state.num_verified) == (2, 2)


def test_what_came_after_a_damaged_block_is_fetched_and_verified_again(destination: Destination) -> None:
    for index in (0, 2):
        destination.verify(index, CHECKSUMS[index : index + 1], CHECKSUMS[index : index + 1])
    destination.state.begin_attempt()
    destination.verify(1, CHECKSUMS[1:2], CHECKSUMS[1:2])
    assert destination.state.num_verified == 2


async def test_a_cancelled_pull_ends_only_when_its_threads_have_let_go(
    destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    entered, leave, left = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def arrive(first: int, last: int) -> list[int]:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(30)
        found = blocks.fetch(first, last)
        left.set()
        return found

    async def pull() -> None:
        async with Crew(destination, threads, blocks) as crew:
            crew.start(0, CHECKSUMS, arrive)
            await crew.join()

    task = asyncio.create_task(pull())
    await entered.wait()
    for _ in range(3):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left.is_set()
    assert not any(blocks.content[1]), "after the turn in hand the thread stops"

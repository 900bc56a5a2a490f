"""Arriving blocks: order, verification, and threads that are gone when the pull is."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest

from kvtransfer.blocks import shares
from kvtransfer.checksum import block_checksum
from kvtransfer.destination import Destination
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Crew, Pull, Sequencer, follow
from kvtransfer.pull_state import DamagedBlockError, InterruptedPullError, PullState
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.layout import KvLayout

SOURCES = [memoryview(bytes([index]) * 64) for index in range(4)]
CHECKSUMS = [block_checksum(source) for source in SOURCES]
TICKET = KvTicket("t", 1, "p", "m", "k", KvLayout(1, 1, 1, 1, "float32"), 4, (0, 1, 2, 3), 5000, (), "nowhere:1")


class Blocks:
    """Four blocks that are taken in one at a time."""

    least_per_job, num_per_job, num_per_turn = 1, 3, 1
    num_here = 0

    def __init__(self) -> None:
        self.content = [bytearray(64) for _ in SOURCES]

    def warm_up(self, threads: Executor, num_threads: int) -> Sequence[Future[None]]:
        return ()

    def checksums(self, block_ids: BlockIds) -> Sums:
        return np.array([block_checksum(bytes(self.content[block])) for block in block_ids], np.uint64)

    def fetch(self, first: int, last: int) -> Sums:
        for index in range(first, last):
            self.content[index][:] = SOURCES[index]
        return self.checksums(np.arange(first, last, dtype=np.int32))


class FewBlocks(Blocks):
    """Up to three are worth no thread."""

    num_here = 3


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


@pytest.mark.parametrize(
    ("last", "num_threads", "expected"),
    [
        (3, 2, []),
        (4, 2, [(3, 1)]),
        (7, 2, [(3, 2), (5, 2)]),
        (10, 2, [(3, 3), (6, 3), (9, 1)]),
        (7, 9, [(3, 1), (4, 1), (5, 1), (6, 1)]),
    ],
)
def test_runs_are_shared_among_threads(last: int, num_threads: int, expected: list[tuple[int, int]], blocks: Blocks) -> None:
    assert list(shares(3, last, num_threads, blocks)) == expected


def news(first: int, num_blocks: int, first_checksum: int, *checksums: int, token: int | None = None, epoch: int = 1) -> NewsFrame:
    return NewsFrame(epoch, first, num_blocks, first_checksum, checksums, token)


def test_frames_in_order_are_new() -> None:
    sequencer = Sequencer(1, 0, 4)
    for frame in (news(0, 2, 0, 7), news(2, 0, 1), news(2, 2, 1, 8, 9), news(4, 0, 3, 10)):
        assert sequencer.accept(frame) == frame and not sequencer.complete
    sequencer.accept(news(4, 0, 4, token=5))
    assert sequencer.complete and sequencer.first_token_id == 5


def test_what_a_frame_repeats_is_left_out() -> None:
    sequencer = Sequencer(1, 0, 4)
    sequencer.accept(news(0, 2, 0, 7))
    assert sequencer.accept(news(0, 2, 0, 7)) == news(2, 0, 1)
    assert sequencer.accept(news(1, 3, 0, 7, 8, 9)) == news(2, 2, 1, 8, 9)
    assert (sequencer.next_block, sequencer.next_checksum) == (4, 3)


@pytest.mark.parametrize(
    "frame",
    [
        news(1, 1, 0),  # a gap
        news(0, 5, 0),  # beyond the ticket
        news(0, 1, 0, epoch=2),
        news(0, 2, 1, 7),  # a gap between checksums
        news(0, 1, 0, 7, 8),  # a checksum before its block
    ],
)
def test_gaps_excess_and_other_epochs_end_the_stream(frame: NewsFrame) -> None:
    with pytest.raises(InterruptedPullError):
        Sequencer(1, 0, 4).accept(frame)


def test_a_first_token_does_not_change() -> None:
    sequencer = Sequencer(1, 0, 4)
    for _ in range(2):
        sequencer.accept(news(0, 0, 0, token=5))
    with pytest.raises(InterruptedPullError):
        sequencer.accept(news(0, 0, 0, token=6))


@pytest.mark.parametrize(
    "missing", [news(0, 3, 0, *CHECKSUMS[:3], token=5), news(0, 4, 0, *CHECKSUMS[:3], token=5), news(0, 4, 0, *CHECKSUMS)]
)
def test_nothing_may_be_missing_at_the_end(missing: NewsFrame) -> None:
    sequencer = Sequencer(1, 0, 4)
    sequencer.accept(missing)
    assert not sequencer.complete


def test_a_token_before_the_last_block_brings_nothing_yet() -> None:
    sequencer = Sequencer(1, 0, 4)
    sequencer.accept(news(0, 3, 0, token=5))
    assert sequencer.coming_token is None
    sequencer.accept(news(3, 1, 0))
    assert sequencer.coming_token == 5 and not sequencer.complete


async def test_blocks_are_copied_and_verified(destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks) -> None:
    async with Crew(destination, threads, blocks, 2) as crew:
        crew.start(0, 3, blocks.fetch)
        destination.told(0, CHECKSUMS[:2])
        crew.start(3, 1, blocks.fetch)
        await crew.join()
        assert destination.state.num_verified == 2, "without its checksum no block counts"
        destination.told(2, CHECKSUMS[2:])
    assert destination.state.num_verified == 4
    assert [bytes(content) for content in blocks.content] == [bytes(source) for source in SOURCES]


async def test_checksums_may_come_before_their_blocks(
    destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    destination.told(0, CHECKSUMS)
    assert destination.state.num_verified == 0
    async with Crew(destination, threads, blocks, 2) as crew:
        crew.start(0, 4, blocks.fetch)
        await crew.join()
    assert destination.state.num_verified == 4


@pytest.mark.parametrize("late", [False, True])
async def test_a_damaged_block_is_named_and_not_counted(
    late: bool, destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    wrong = [*CHECKSUMS[:2], 1, CHECKSUMS[3]]
    with pytest.raises(DamagedBlockError) as caught:
        async with Crew(destination, threads, blocks, 1) as crew:
            if not late:
                destination.told(0, wrong)
            crew.start(0, 4, blocks.fetch)
            await crew.join()
            destination.told(0, wrong)
    assert (caught.value.index, destination.state.num_verified) == (2, 2)


def test_what_came_after_a_damaged_block_is_fetched_and_verified_again(destination: Destination) -> None:
    destination.told(0, CHECKSUMS)
    for index in (0, 2):
        destination.arrived(index, np.array(CHECKSUMS[index : index + 1], np.uint64))
    destination.begin_attempt()
    destination.told(1, CHECKSUMS[1:])
    destination.arrived(1, np.array(CHECKSUMS[1:2], np.uint64))
    assert destination.state.num_verified == 2


async def test_a_pull_has_heard_everything_before_it_ends(
    destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    told = [news(0, 4, 0, *CHECKSUMS[:1], token=5), news(4, 0, 1), news(4, 0, 1, *CHECKSUMS[1:])]

    async def frames() -> AsyncGenerator[NewsFrame, None]:
        while told:
            yield told.pop(0)

    async def bring(_: NewsFrame, new: NewsFrame) -> None:
        crew.start(new.first_block_index, new.num_blocks, blocks.fetch)

    async with Crew(destination, threads, blocks, 2) as crew:
        pull = Pull(TICKET, destination, crew)
        assert await follow(frames(), pull, bring) == 5 and not told
        await crew.join()
        destination.begin_attempt()
        with pytest.raises(InterruptedPullError, match="early"):
            await follow(frames(), pull, bring)


async def test_a_cancelled_pull_ends_only_when_its_threads_have_let_go(
    destination: Destination, threads: ThreadPoolExecutor, blocks: Blocks
) -> None:
    entered, leave, left = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def arrive(first: int, last: int) -> Sums:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(30)
        found = blocks.fetch(first, last)
        left.set()
        return found

    async def pull() -> None:
        async with Crew(destination, threads, blocks, 1) as crew:
            crew.submit(0, 4, arrive)
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


async def test_few_blocks_are_taken_in_at_once(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks = FewBlocks()
    destination.told(0, CHECKSUMS)
    async with Crew(destination, threads, blocks, 2) as crew:
        crew.start(0, 3, blocks.fetch)
        assert destination.state.num_verified == 3


async def test_few_blocks_join_the_threads_at_work(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks, leave, names = FewBlocks(), threading.Event(), list[str]()

    def arrive(first: int, last: int) -> Sums:
        names.append(threading.current_thread().name)
        assert leave.wait(30)
        return blocks.fetch(first, last)

    destination.told(0, CHECKSUMS)
    async with Crew(destination, threads, blocks, 2) as crew:
        crew.submit(0, 3, arrive)
        crew.start(3, 1, arrive)
        leave.set()
        await crew.join()
    assert destination.state.num_verified == 4
    assert threading.main_thread().name not in names


async def test_few_damaged_blocks_are_refused_at_once(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks = FewBlocks()
    destination.told(0, [CHECKSUMS[0], CHECKSUMS[1] ^ 1, CHECKSUMS[2]])
    async with Crew(destination, threads, blocks, 2) as crew:
        with pytest.raises(DamagedBlockError, match="block 1"):
            crew.start(0, 3, blocks.fetch)
    assert destination.state.num_verified == 1


@pytest.mark.parametrize("kind", [Blocks, FewBlocks])
async def test_a_run_of_no_blocks_asks_nothing_of_a_device(
    kind: type[Blocks], destination: Destination, threads: ThreadPoolExecutor
) -> None:
    def arrive(first: int, last: int) -> Sums:
        raise AssertionError("nothing has come")

    async with Crew(destination, threads, kind(), 2) as crew:
        crew.start(1, 0, arrive)
        await crew.join()


class Begun:
    """A device's copy, which is done when a test says so, or when a thread has waited for it."""

    def __init__(self, blocks: Blocks, first: int, last: int, *, on_wait: bool = False) -> None:
        self.event = self
        self.cuda_event = 0
        self._blocks, self._run, self._on_wait = blocks, (first, last), on_wait
        self.is_done = False
        self.error: Exception | None = None
        self.waiter = ""

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.is_done

    def wait(self) -> None:
        self.waiter = threading.current_thread().name
        self.is_done = True

    def sums(self) -> Sums:
        assert self.is_done
        return self._blocks.fetch(*self._run)


class Device:
    """Begins copies of some blocks."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self.begun: list[Begun] = []

    def begin(self, first: int, last: int) -> Begun:
        self.begun.append(Begun(self._blocks, first, last))
        return self.begun[-1]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for a device."""
    monkeypatch.setattr("kvtransfer.intake.LOOKS_S", 60.0)


@pytest.mark.usefixtures("patient")
async def test_what_a_device_copies_is_taken_in_when_it_is_done(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks = FewBlocks()
    device = Device(blocks)
    destination.told(0, CHECKSUMS)
    async with Crew(destination, threads, blocks, 2) as crew:
        assert crew.events() is None, "nothing was begun"
        crew.start(0, 2, blocks.fetch, device.begin)
        crew.start(2, 2, blocks.fetch, device.begin)
        first, second = device.begun
        assert crew.events() == [first, second] and destination.state.num_verified == 0
        second.is_done = True
        for _ in range(5):
            await asyncio.sleep(0)
        assert crew.events() == [first]
        first.is_done = True
        await crew.join()
        assert crew.events() == [] and destination.state.num_verified == 4


@pytest.mark.usefixtures("patient")
async def test_what_a_thread_does_as_well_is_behind_no_event(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks, leave = FewBlocks(), threading.Event()
    device = Device(blocks)

    def arrive(first: int, last: int) -> Sums:
        assert leave.wait(30)
        return blocks.fetch(first, last)

    async with Crew(destination, threads, blocks, 2) as crew:
        crew.start(0, 2, arrive, device.begin)
        crew.submit(2, 1, arrive)
        assert crew.events() is None
        crew.start(3, 1, arrive, device.begin)
        assert len(device.begun) == 1, "it joins the thread at work"
        leave.set()
        while crew.events() is None:  # noqa: ASYNC110 - whatever changes it knows no event
            await asyncio.sleep(0.001)
        assert crew.events() == device.begun
        device.begun[0].is_done = True


async def test_a_copy_that_takes_long_is_a_threads_to_wait_for(
    destination: Destination, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.intake.LOOKS_S", 0.001)
    blocks = FewBlocks()
    device = Device(blocks)
    async with Crew(destination, threads, blocks, 2) as crew:
        crew.start(0, 2, blocks.fetch, device.begin)
        await crew.join()
    assert device.begun[0].waiter not in ("", threading.main_thread().name)


async def test_a_device_that_fails_is_everybodys_failure(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks = FewBlocks()
    device = Device(blocks)
    with pytest.raises(RuntimeError, match="injected"):
        async with Crew(destination, threads, blocks, 2) as crew:
            crew.start(0, 2, blocks.fetch, device.begin)
            device.begun[0].error = RuntimeError("injected")
            await crew.join()


async def test_when_the_loop_ends_a_copy_is_waited_for(destination: Destination, threads: ThreadPoolExecutor) -> None:
    blocks = FewBlocks()
    device = Device(blocks)
    with pytest.raises(asyncio.CancelledError):
        async with Crew(destination, threads, blocks, 2) as crew:
            before = asyncio.all_tasks()
            crew.start(0, 2, blocks.fetch, device.begin)
            (looking,) = asyncio.all_tasks() - before
            await asyncio.sleep(0)
            looking.cancel()
            await crew.join()
    assert device.begun[0].waiter == threading.main_thread().name

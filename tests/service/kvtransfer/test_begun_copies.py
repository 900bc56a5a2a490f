"""Pulls whose blocks a device copies while the event loop goes on: whoever they are for may begin before they are verified."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvtransfer.connections import Answer
from kvtransfer.frames import NewsFrame
from kvtransfer.pull_state import InterruptedPullError
from llm.kv.copying import Event
from tandem.errors import Reason, TandemError
from tests.fakes.cuda_calls import FakeCuda
from tests.fakes.late_copies import LateCopy, make_late
from tests.service.kvtransfer.gpu_harness import device_blocks, device_lane, fake_gpus, gpu_pool
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, Transfer, transfer

MINE = [7, 3, 30, 11, 0, 22, 5, 38]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """GPUs that are never slow, however busy this machine is."""
    monkeypatch.setattr("kvtransfer.device_blocks.SLOW_S", 60.0)
    return fake_gpus(monkeypatch)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateCopy]:
    return make_late(monkeypatch, looks=math.inf)


@dataclass
class Told:
    """A recipient that notes what it is told: how many copies are to be waited for, or -1 when all is withdrawn."""

    words: list[int] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    def coming(self, first_token_id: int, after: Sequence[Event]) -> None:
        assert first_token_id == FIRST_TOKEN
        self.words.append(len(after))
        self.came.set()

    def withdrawn(self) -> None:
        if self.words:
            self.words.append(-1)
        self.came.clear()


def pull(at: Transfer, ticket: object, told: Told) -> asyncio.Task:
    return asyncio.create_task(at.puller.pull(ticket, MINE, told))


async def test_the_recipient_begins_before_the_copy_is_done(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        await asyncio.sleep(0.001)
        assert told.words == [1] and not at.arrived(ticket, MINE) and not pulling.done()
        late[0].make()
        result = await pulling
        assert (result.first_token_id, result.num_refetched) == (FIRST_TOKEN, 0)
        assert at.arrived(ticket, MINE) and told.words == [1]


async def test_a_token_that_comes_after_the_blocks_brings_the_word(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = at.grant(), Told()
        pulling = pull(at, ticket, told)
        at.producer.progress(ticket.ticket_id, 5)
        await at.until(lambda: len(late) == 1)
        late[0].make()
        at.producer.progress(ticket.ticket_id, 8)
        await at.until(lambda: len(late) == 2)
        assert told.words == []
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        await told.came.wait()
        assert told.words[0] == 1, "the second copy; the first is here"
        late[1].make()
        await pulling
        assert at.arrived(ticket, MINE)


async def test_a_cancelled_pull_waits_for_what_was_begun(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        for _ in range(3):
            pulling.cancel()
            await asyncio.sleep(0.005)
            assert not pulling.done(), "the device still writes to the blocks"
        late[0].make()
        with pytest.raises(asyncio.CancelledError):
            await pulling


async def test_damage_that_is_found_late_is_withdrawn_before_blocks_are_written_again(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        at.flip(5)
        late[0].make()
        at.flip(5)
        await at.until(lambda: len(late) == 2)
        assert told.words == [1, -1, 1] and not at.arrived(ticket, MINE)
        late[1].make()
        assert (await pulling).num_refetched == 1
        assert at.arrived(ticket, MINE)


async def test_damage_that_does_not_end_is_an_error(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        at.flip(5)
        pulling = pull(at, ticket, told)
        for count in range(1, 4):
            await at.until(lambda count=count: len(late) == count)
            late[-1].make()
        with pytest.raises(TandemError) as caught:
            await pulling
        assert caught.value.reason is Reason.KV_CHECKSUM_MISMATCH
        assert told.words == [1, -1, 1, -1, 1]


async def test_a_cut_after_the_word_is_withdrawn(late: list[LateCopy], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cuts = Answer.frames, iter([True, False])

    async def frames(answer: Answer) -> AsyncGenerator[NewsFrame, None]:
        cut = next(cuts)
        async for frame in whole(answer):
            yield NewsFrame(frame.epoch, 0, frame.num_blocks, 0, (), frame.first_token_id) if cut else frame
            if cut:
                raise InterruptedPullError("injected")

    monkeypatch.setattr(Answer, "frames", frames)
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        await asyncio.sleep(0.005)
        assert told.words == [1], "what was begun comes to its end before anybody writes again"
        late[0].make()
        await at.until(lambda: len(late) == 2)
        late[1].make()
        assert (await pulling).num_resumed == 1
        assert told.words == [1, -1, 1] and at.arrived(ticket, MINE)


async def test_blocks_that_are_reused_under_a_copy_are_never_taken_in(late: list[LateCopy]) -> None:
    """Their bytes stay what they were, so their checksums could not tell."""
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        at.source.generations.bump(ticket.block_ids[3])
        late[0].make()
        with pytest.raises(TandemError) as caught:
            await pulling
        assert caught.value.reason is Reason.TICKET_NOT_FOUND


async def test_a_device_that_fails_under_a_copy_ends_the_pull(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        late[0].fail(RuntimeError("injected"))
        with pytest.raises(RuntimeError, match="injected"):
            await pulling


async def test_a_thread_waits_for_a_copy_that_takes_long(late: list[LateCopy]) -> None:
    async with transfer("cuda_ipc", make_pool=gpu_pool) as at:
        ticket, told = await at.sealed(), Told()
        pulling = pull(at, ticket, told)
        await told.came.wait()
        await at.until(lambda: bool(late[0].waiters))
        late[0].make()
        await pulling
        assert at.arrived(ticket, MINE)
    assert [name.startswith("kv-pull") for name in late[0].waiters] == [True]


@pytest.mark.parametrize("transport", ["tcp", "cuda_ipc"])
async def test_nobody_begins_with_what_threads_bring(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr("kvtransfer.device_blocks.HERE_BYTES", 0)
    async with transfer(transport, make_pool=gpu_pool) as at:
        ticket, told = at.complete(), Told()
        assert (await pull(at, ticket, told)).transport == transport
        assert told.words == [] and at.arrived(ticket, MINE)


def test_a_lane_begins_as_many_as_it_has_room_for() -> None:
    source, pool = gpu_pool(LAYOUT, 8), gpu_pool(LAYOUT, 8)
    source.tensor.normal_()
    blocks = device_blocks.DeviceBlocks(pool)
    one = [np.array([index], np.int32) for index in range(device_lane.NUM_BEGUN)]
    begun = [blocks.begin_fetch(source.tensor, ids, ids) for ids in one]
    assert blocks.num_here == 0, "threads have what comes now"
    assert [fetch.sums()[0] for fetch in begun] == [blocks.checksums(ids)[0] for ids in one]
    assert len({int(blocks.checksums(ids)[0]) for ids in one}) == len(one)
    assert blocks.num_here > 0
    source.close()
    pool.close()


def test_a_copy_that_a_thread_waited_for_says_that_the_gpu_is_slow() -> None:
    source, pool = gpu_pool(LAYOUT, 2), gpu_pool(LAYOUT, 2)
    blocks, ids = device_blocks.DeviceBlocks(pool), np.zeros(1, np.int32)
    for waited in (False, True):
        copying = blocks.begin_fetch(source.tensor, ids, ids)
        assert copying.done()
        if waited:
            copying.wait()
        copying.sums()
        assert (blocks.num_here == 0) == waited
    source.close()
    pool.close()

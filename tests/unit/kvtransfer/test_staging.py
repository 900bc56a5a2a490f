"""Pinned memory between a GPU pool and the network: always given back, and never waited for by who holds some."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import torch

from kvtransfer import staging
from kvtransfer.staging import DeviceStage
from llm.kv.block_arrays import BlockIds, Sums

BLOCK = 16


class Blocks:
    """Block i holds the byte i. `gate` holds copies up."""

    num_per_job = 256
    block_bytes = BLOCK

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_loaded = 0
        self.stored: list[tuple[int, bytes]] = []

    def pinned(self, num_blocks: int) -> torch.Tensor:
        return torch.zeros(num_blocks, BLOCK, dtype=torch.uint8)

    def load(self, block_ids: BlockIds, staged: torch.Tensor) -> None:
        assert self.gate.wait(30)
        self.num_loaded += len(block_ids)
        for row, block in zip(staged, block_ids, strict=True):
            row.fill_(block)

    def store(self, staged: torch.Tensor, block_ids: BlockIds) -> Sums:
        self.stored += [(block, row.numpy().tobytes()) for row, block in zip(staged, block_ids, strict=True)]
        return np.zeros(len(block_ids), np.uint64)


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DeviceStage]:
    monkeypatch.setattr(staging, "SLOT_BYTES", 2 * BLOCK)
    made = DeviceStage(Blocks(), num_slots=2)  # type: ignore[arg-type]
    yield made
    await made.close()


async def read_all(stage: DeviceStage, block_ids: Sequence[int]) -> list[int]:
    return [view[0] async for run in stage.lend(np.array(block_ids, np.int32)) for view in run]


def blocks(stage: DeviceStage) -> Blocks:
    return stage._blocks  # type: ignore[return-value]


async def all_slots_are_free(stage: DeviceStage) -> bool:
    """Takes every slot, and gives them back."""
    slots = [await asyncio.wait_for(stage._take(), 30) for _ in range(2)]
    for slot in slots:
        stage._slots.put_nowait(slot)
    return len({slot.data_ptr() for slot in slots}) == 2


async def test_blocks_come_in_order(stage: DeviceStage) -> None:
    assert await read_all(stage, [5, 1, 4, 2, 3]) == [5, 1, 4, 2, 3]
    assert await all_slots_are_free(stage)


async def test_many_readers_share_few_slots(stage: DeviceStage) -> None:
    wanted = [list(range(start, start + 7)) for start in range(6)]
    assert await asyncio.gather(*(read_all(stage, ids) for ids in wanted)) == wanted
    assert await all_slots_are_free(stage)


async def test_the_next_run_is_loaded_while_one_is_in_use(stage: DeviceStage) -> None:
    lent = stage.lend(np.arange(6, dtype=np.int32))
    await anext(lent)
    async with asyncio.timeout(30):
        while blocks(stage).num_loaded < 4:  # noqa: ASYNC110 - a thread counts
            await asyncio.sleep(0)
    await lent.aclose()
    assert await all_slots_are_free(stage)


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_reader_that_leaves_gives_all_back(stage: DeviceStage, after: int) -> None:
    lent = stage.lend(np.arange(6, dtype=np.int32))
    for _ in range(after):
        await anext(lent)
    blocks(stage).gate.clear()
    waiting = asyncio.create_task(anext(lent))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await lent.aclose()
    blocks(stage).gate.set()
    assert await all_slots_are_free(stage)


async def test_what_was_received_is_brought_to_its_block(stage: DeviceStage) -> None:
    room = await stage.room(np.array([9, 8], np.int32))
    for number, view in enumerate(room.views):
        view[:] = bytes([number + 1]) * BLOCK
    assert room.bring(0, 2).tolist() == [0, 0]
    assert blocks(stage).stored == [(9, bytes([1]) * BLOCK), (8, bytes([2]) * BLOCK)]
    room.release()
    assert await all_slots_are_free(stage)

"""The cuda_ipc transport: a producer's pool in GPU memory, opened from here and read by one kernel for each run of blocks.

A frame is only sent once its blocks are complete on the producer's device, so nothing has to be waited for between the two.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from kvtransfer.fence import Fence
from kvtransfer.frames import Frame
from kvtransfer.intake import Pull, follow
from llm.kv.device_memory import ImportedMemory

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks


async def fetch(frames: AsyncGenerator[Frame, None], memory: ImportedMemory, fence: Fence, blocks: DeviceBlocks, pull: Pull) -> int:
    """Copies the blocks that `frames` tell of; returns and raises what `follow` does, and TICKET_NOT_FOUND as the fence does."""

    source_ids, block_ids = pull.ticket.block_ids, pull.destination.block_ids

    def arrive(first: int, last: int) -> list[int]:
        return blocks.fetch(memory.tensor, source_ids[first:last], block_ids[first:last])

    return await follow(frames, pull, fence.guard(pull.ticket, arrive))

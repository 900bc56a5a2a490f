"""The shm and cuda_ipc transports: a producer's pool, mapped or opened here, from which threads copy.

A block is only told once it is complete on the producer's device, so nothing has to be waited for between the two.
"""

from collections.abc import AsyncGenerator, Callable

import numpy as np

from kvtransfer.fence import Fence
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Pull, follow
from llm.kv.block_arrays import BlockIds, Sums

Copy = Callable[[BlockIds, BlockIds], Sums]
"""Copies the producer's blocks into ours; the checksums of what then lies in ours."""


async def fetch(frames: AsyncGenerator[NewsFrame, None], copy: Copy, fence: Fence, pull: Pull) -> int:
    """Copies the blocks that `frames` tell of; returns and raises what `follow` does, and TICKET_NOT_FOUND as the fence does."""
    source_ids, block_ids = np.array(pull.ticket.block_ids, np.int32), pull.destination.block_ids

    def copied(first: int, last: int) -> Sums:
        return copy(source_ids[first:last], block_ids[first:last])

    arrive = fence.guard(pull.ticket, source_ids, copied)

    async def bring(_: NewsFrame, new: NewsFrame) -> None:
        pull.crew.start(new.first_block_index, new.num_blocks, arrive)

    return await follow(frames, pull, bring)

"""The shm and cuda_ipc transports: a producer's pool, mapped or opened here, from which threads copy.

A block is only told once it is complete on the producer's device, so nothing has to be waited for between the two.
"""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import numpy as np

from kvtransfer.fence import Fence
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Pull, follow
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.copying import Copying


@dataclass(frozen=True)
class Reader:
    """`copy` copies the producer's blocks into ours, and gives the checksums of what then lies in ours; `begin` begins that."""

    copy: Callable[[BlockIds, BlockIds], Sums]
    begin: Callable[[BlockIds, BlockIds], Copying] | None = None


async def fetch(frames: AsyncGenerator[NewsFrame, None], reader: Reader, fence: Fence, pull: Pull) -> int:
    """Copies the blocks that `frames` tell of; returns and raises what `follow` does, and TICKET_NOT_FOUND as the fence does."""
    source_ids, block_ids = np.array(pull.ticket.block_ids, np.int32), pull.destination.block_ids

    def copied(first: int, last: int) -> Sums:
        return reader.copy(source_ids[first:last], block_ids[first:last])

    def begun(first: int, last: int) -> Copying:
        assert reader.begin is not None
        return reader.begin(source_ids[first:last], block_ids[first:last])

    arrive = fence.guard(pull.ticket, source_ids, copied)
    begin = None if reader.begin is None else fence.guard_begun(pull.ticket, source_ids, begun)

    async def bring(_: NewsFrame, new: NewsFrame) -> None:
        pull.crew.start(new.first_block_index, new.num_blocks, arrive, begin)

    return await follow(frames, pull, bring)

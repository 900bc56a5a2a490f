"""The tcp transport: a producer's blocks come over the KV connection, behind the frames that tell of them."""

from kvtransfer.connections import Answer
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Pull, follow
from kvtransfer.staging import Stage
from llm.kv.block_arrays import Sums


async def fetch(answer: Answer, stage: Stage, pull: Pull) -> int:
    """Receives the blocks, each group of which is verified by threads while the next is on its way.

    Returns and raises what `follow` does.
    """

    async def bring(frame: NewsFrame, new: NewsFrame) -> None:
        await _skip(answer, frame.num_blocks - new.num_blocks, pull.ticket.layout.block_bytes)
        end = new.first_block_index + new.num_blocks
        for first in range(new.first_block_index, end, stage.num_per_room):
            await _receive_run(answer, stage, pull, first, min(stage.num_per_room, end - first))
            pull.crew.check()

    return await follow(answer.frames(), pull, bring)


async def _skip(answer: Answer, num_blocks: int, block_bytes: int) -> None:
    """Blocks that came before."""
    if num_blocks:
        scratch = memoryview(bytearray(block_bytes))
        for _ in range(num_blocks):
            await answer.receive_into(scratch)


async def _receive_run(answer: Answer, stage: Stage, pull: Pull, first: int, num_blocks: int) -> None:
    room = await stage.room(pull.destination.block_ids[first : first + num_blocks])
    try:
        for view in room.views:
            await answer.receive_into(view)
    except BaseException:
        room.release()
        raise

    def arrive(start: int, end: int) -> Sums:
        return room.bring(start - first, end - first)

    if room.here:
        pull.crew.take_in_here(first, num_blocks, arrive)
        return
    job = pull.crew.submit(first, num_blocks, arrive)
    job.add_done_callback(lambda _: room.release())

"""The shm transport: a producer's pool, mapped read-only."""

from collections.abc import AsyncGenerator
from contextlib import suppress

from kvtransfer.fence import Fence
from kvtransfer.frames import Frame
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.intake import Pull, follow
from kvtransfer.mapped_file import map_file
from llm.kv.memory_file import MemoryFile


class Mapping:
    """The mapped pool of one producer. The kernel ends the producer's memory only when this is closed too."""

    def __init__(self, file: MemoryFile) -> None:
        """Raises UnmappableError."""
        self.file = file
        self._memory = map_file(file)
        self._bytes = memoryview(self._memory)

    def block(self, block_id: int, block_bytes: int) -> memoryview:
        """A block's bytes in the producer's pool, read-only; they may change as soon as the ticket's lease is over."""
        return self._bytes[block_id * block_bytes : (block_id + 1) * block_bytes]

    def close(self) -> None:
        # A traceback that is still about may hold a view; the memory then goes with it.
        with suppress(BufferError):
            self._bytes.release()
            self._memory.close()


async def fetch(frames: AsyncGenerator[Frame, None], mapping: Mapping, fence: Fence, blocks: HostBlocks, pull: Pull) -> int:
    """Copies the blocks that `frames` tell of; returns and raises what `follow` does, and TICKET_NOT_FOUND as the fence does."""
    size, source_ids, block_ids = pull.ticket.layout.block_bytes, pull.ticket.block_ids, pull.destination.block_ids

    def arrive(first: int, last: int) -> list[int]:
        sources = [mapping.block(block, size) for block in source_ids[first:last]]
        return blocks.fetch(sources, block_ids[first:last])

    return await follow(frames, pull, fence.guard(pull.ticket, arrive))

"""How often each block of a pool was handed out anew, where other processes can see it.

A block's content belongs to one generation of it: whoever reads it from outside looks at the generation before and after (a
seqlock). The writer's side is that `bump` comes before the block's new owner can write. The table lies in host memory, wherever the
pool does.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

from llm.kv import memory_file

MEMORY_NAME = "tandem-kv-generations"
ITEM_BYTES = 8


class BlockGenerations:
    """One pool's table; the pool closes it."""

    def __init__(self, num_blocks: int) -> None:
        self._memory, self.shared = memory_file.allocate(MEMORY_NAME, num_blocks * ITEM_BYTES)
        """`shared`: None where memory cannot be shared, or once closed."""
        self._counts = memoryview(self._memory).cast("Q")

    def bump(self, block_id: int) -> None:
        """The block is handed out: what was in it may change from now on."""
        self._counts[block_id] += 1

    def of(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._counts[block] for block in block_ids)

    def close(self) -> None:
        """Idempotent."""
        if self.shared is not None:
            os.close(self.shared.fd)
        self.shared = None
        with suppress(BufferError):
            self._counts.release()
            self._memory.close()

"""A producer's pool in host memory, mapped read-only."""

import mmap
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kvtransfer.mapped_file import map_file
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Memory
from llm.kv.memory_file import MemoryFile

_LET_GO_BYTES = 16 << 20
"""After so many bytes are read, their pages leave this process's memory: with them it would look as large as both pools. The
system does that in a tenth of a millisecond, and maps pages that are read again sixteen at a time."""


class Mapping:
    """The mapped pool of one producer. The kernel ends the producer's memory only when this is closed too."""

    def __init__(self, file: MemoryFile) -> None:
        """Raises UnmappableError."""
        self.file = file
        self._memory = map_file(file)
        self.bytes: Memory = np.frombuffer(self._memory, np.uint8)
        """The producer's pool, read-only; blocks may change as soon as their ticket's lease is over."""
        self._read_bytes = 0

    def read(
        self, fetch: Callable[[Memory, BlockIds, BlockIds], Sums], block_bytes: int, source_ids: BlockIds, block_ids: BlockIds
    ) -> Sums:
        """What `fetch` returns for these blocks of the producer's. On any thread; a count that two of them change at once may lose
        one of both."""
        sums = fetch(self.bytes, source_ids, block_ids)
        self._read_bytes += len(source_ids) * block_bytes
        if self._read_bytes >= _LET_GO_BYTES:
            self._read_bytes = 0
            self._memory.madvise(mmap.MADV_DONTNEED)
        return sums

    def close(self) -> None:
        # A traceback that is still about may hold a view; the memory then goes with it.
        self.bytes = np.zeros(0, np.uint8)
        with suppress(BufferError):
            self._memory.close()

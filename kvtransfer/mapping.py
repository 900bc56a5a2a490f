"""A producer's pool in host memory, mapped read-only."""

from contextlib import suppress

import numpy as np

from kvtransfer.mapped_file import map_file
from llm.kv.host_copies import Memory
from llm.kv.memory_file import MemoryFile


class Mapping:
    """The mapped pool of one producer. The kernel ends the producer's memory only when this is closed too."""

    def __init__(self, file: MemoryFile) -> None:
        """Raises UnmappableError."""
        self.file = file
        self._memory = map_file(file)
        self.bytes: Memory = np.frombuffer(self._memory, np.uint8)
        """The producer's pool, read-only; blocks may change as soon as their ticket's lease is over."""

    def close(self) -> None:
        # A traceback that is still about may hold a view; the memory then goes with it.
        self.bytes = np.zeros(0, np.uint8)
        with suppress(BufferError):
            self._memory.close()

"""Tells a reader of a producer's memory whether a block is still the ticket's."""

from contextlib import suppress

import numpy as np

from kvtransfer.intake import Arrival
from kvtransfer.ledger import not_found
from kvtransfer.mapped_file import map_file
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.generations import ITEM_BYTES
from llm.kv.memory_file import MemoryFile


class Fence:
    """One producer's table of block generations, mapped."""

    def __init__(self, file: MemoryFile) -> None:
        """Raises UnmappableError."""
        self.file = file
        self._memory = map_file(file)
        self._counts = np.frombuffer(self._memory, np.uint64, file.num_bytes // ITEM_BYTES)

    @property
    def num_blocks(self) -> int:
        return len(self._counts)

    def guard(self, ticket: KvTicket, source_ids: BlockIds, arrive: Arrival) -> Arrival:
        """`arrive`, which reads the ticket's blocks from one index up to another, between two looks at their generations.

        The result raises TICKET_NOT_FOUND for a block that was handed out since the grant: its bytes may be another's, in whole or
        in part. The look after the reading is the one that counts; the one before saves reading in vain.
        """
        assert ticket.fence is not None, "a transport that maps memory is chosen only if the blocks are fenced"
        generations, places = np.array(ticket.fence.generations, np.uint64), source_ids.astype(np.intp)

        def check(first: int, last: int) -> None:
            now, granted = self._counts[places[first:last]], generations[first:last]
            if now.tobytes() != granted.tobytes():  # a seventh of what comparing them as arrays takes
                index = first + int((now != granted).argmax())
                raise not_found(ticket.ticket_id, ticket.epoch, f"over: its block {index} is in other use")

        def guarded(first: int, last: int) -> Sums:
            check(first, last)
            found = arrive(first, last)
            check(first, last)
            return found

        return guarded

    def close(self) -> None:
        self._counts = np.zeros(0, np.uint64)
        with suppress(BufferError):
            self._memory.close()

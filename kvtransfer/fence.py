"""Tells a reader of a producer's memory whether a block is still the ticket's."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np

from kvtransfer.intake import Arrival, Begin
from kvtransfer.ledger import not_found
from kvtransfer.mapped_file import map_file
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.copying import Copying
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
        look = self._look(ticket, source_ids)

        def guarded(first: int, last: int) -> Sums:
            look(first, last)
            found = arrive(first, last)
            look(first, last)
            return found

        return guarded

    def guard_begun(self, ticket: KvTicket, source_ids: BlockIds, begin: Begin) -> Begin:
        """The same for a reading that is only begun. The second look is that of whoever takes the sums, and raises there."""
        look = self._look(ticket, source_ids)

        def guarded(first: int, last: int) -> Copying:
            look(first, last)
            return _Guarded(begin(first, last), partial(look, first, last))

        return guarded

    def _look(self, ticket: KvTicket, source_ids: BlockIds) -> Callable[[int, int], None]:
        assert ticket.fence is not None, "a transport that maps memory is chosen only if the blocks are fenced"
        generations, places = np.array(ticket.fence.generations, np.uint64), source_ids.astype(np.intp)

        def look(first: int, last: int) -> None:
            now, granted = self._counts[places[first:last]], generations[first:last]
            if now.tobytes() != granted.tobytes():  # a seventh of what comparing them as arrays takes
                index = first + int((now != granted).argmax())
                raise not_found(ticket.ticket_id, ticket.epoch, f"over: its block {index} is in other use")

        return look

    def close(self) -> None:
        self._counts = np.zeros(0, np.uint64)
        with suppress(BufferError):
            self._memory.close()


class _Guarded:
    """A reading after which the generations are looked at."""

    def __init__(self, copying: Copying, look: Callable[[], None]) -> None:
        self.event, self.done, self.wait = copying.event, copying.done, copying.wait
        self._copying, self._look = copying, look

    def sums(self) -> Sums:
        found = self._copying.sums()
        self._look()
        return found

"""Tells a reader of a producer's memory whether a block is still the ticket's."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from kvtransfer.ledger import not_found
from kvtransfer.mapped_file import map_file
from kvtransfer.ticket import KvTicket
from llm.kv.generations import ITEM_BYTES
from llm.kv.memory_file import MemoryFile


class Fence:
    """One producer's table of block generations, mapped."""

    def __init__(self, file: MemoryFile) -> None:
        """Raises UnmappableError."""
        self.file = file
        self._memory = map_file(file)
        self._counts = memoryview(self._memory)[: file.num_bytes // ITEM_BYTES * ITEM_BYTES].cast("Q")

    @property
    def num_blocks(self) -> int:
        return len(self._counts)

    def guard(self, ticket: KvTicket, arrive: Callable[[int, int], Sequence[int]]) -> Callable[[int, int], Sequence[int]]:
        """`arrive`, which reads the ticket's blocks from one index up to another, between two looks at their generations.

        The result raises TICKET_NOT_FOUND for a block that was handed out since the grant: its bytes may be another's, in whole or
        in part. The look after the reading is the one that counts; the one before saves reading in vain.
        """
        assert ticket.fence is not None, "a transport that maps memory is chosen only if the blocks are fenced"
        generations = ticket.fence.generations

        def guarded(first: int, last: int) -> Sequence[int]:
            self._check(ticket, generations, first, last)
            found = arrive(first, last)
            self._check(ticket, generations, first, last)
            return found

        return guarded

    def close(self) -> None:
        with suppress(BufferError):
            self._counts.release()
            self._memory.close()

    def _check(self, ticket: KvTicket, generations: Sequence[int], first: int, last: int) -> None:
        for index in range(first, last):
            if self._counts[ticket.block_ids[index]] != generations[index]:
                raise not_found(ticket.ticket_id, ticket.epoch, f"over: its block {index} is in other use")

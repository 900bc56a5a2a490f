"""Tickets and their leases: who may still read which blocks, and when they are provably no longer needed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)


class State(Enum):
    """Where a ticket stands. The last three are final."""

    GRANTED = "granted"  # its blocks are allocated
    FILLING = "filling"  # some are ready
    READY = "ready"  # all are ready, and the first token is drawn; from now on the lease runs
    PULLED = "pulled"  # a consumer has been told everything
    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"

    @property
    def final(self) -> bool:
        return self in (State.RELEASED, State.EXPIRED, State.ABORTED)


@dataclass(eq=False)
class Entry:
    """A ticket in the ledger; changed by the ledger only."""

    ticket_id: str
    epoch: int
    block_ids: tuple[int, ...]
    state: State = State.GRANTED
    num_ready_blocks: int = 0
    first_token_id: int | None = None
    error: TandemError | None = None
    num_readers: int = 0
    expires_at: float | None = None
    """On the ledger's clock; None while the producer's own request holds the blocks."""

    def __str__(self) -> str:
        return f"ticket {self.ticket_id[:8]} epoch {self.epoch}"


class TicketLedger:
    """Every ticket from its grant until its blocks are freed.

    `free(block_ids)` is called exactly once for each ticket: when its state is final and nobody reads. Transitions may be repeated
    and may come late; one that no longer applies does nothing. `clock` gives seconds and never goes back. Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float], lease_s: float, free: Callable[[Sequence[int]], None]) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._free = free
        self._entries: dict[str, Entry] = {}

    @property
    def num_outstanding(self) -> int:
        """Tickets whose blocks have not been freed."""
        return len(self._entries)

    @property
    def ticket_ids(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def get(self, ticket_id: str) -> Entry | None:
        return self._entries.get(ticket_id)

    def grant(self, ticket_id: str, epoch: int, block_ids: Sequence[int]) -> Entry:
        """Takes over one reference to each block."""
        assert ticket_id not in self._entries, "ticket ids are unique"
        entry = self._entries[ticket_id] = Entry(ticket_id, epoch, tuple(block_ids))
        logger.debug("%s: granted %d blocks", entry, len(entry.block_ids))
        return entry

    def progress(self, ticket_id: str, num_ready_blocks: int) -> Entry | None:
        """The first `num_ready_blocks` blocks will not change any more. None if the ticket is over, else its entry."""
        entry = self._live(ticket_id)
        if entry is not None and num_ready_blocks > entry.num_ready_blocks:
            assert num_ready_blocks <= len(entry.block_ids), "more blocks are ready than were granted"
            entry.num_ready_blocks = num_ready_blocks
            if entry.state is State.GRANTED:
                self._move(entry, State.FILLING)
        return entry

    def finish(self, ticket_id: str, first_token_id: int) -> Entry | None:
        """All blocks are ready, the first token is known; the lease begins. None if the ticket is over, else its entry."""
        entry = self._live(ticket_id)
        if entry is not None and entry.first_token_id is None:
            entry.num_ready_blocks = len(entry.block_ids)
            entry.first_token_id = first_token_id
            entry.expires_at = self._clock() + self._lease_s
            self._move(entry, State.READY)
        return entry

    def open(self, ticket_id: str, epoch: int) -> Entry:
        """Adds a reader, who must `close`. Raises TICKET_NOT_FOUND if the ticket is unknown, over, or of another epoch."""
        entry = self._live(ticket_id)
        if entry is None or entry.epoch != epoch:
            raise not_found(ticket_id, epoch, "unknown or over" if entry is None else f"of epoch {entry.epoch}")
        entry.num_readers += 1
        self.renew(entry)
        return entry

    def close(self, entry: Entry) -> None:
        """Takes a reader away."""
        assert entry.num_readers > 0, "a reader closed twice"
        entry.num_readers -= 1
        self._settle(entry)

    def renew(self, entry: Entry) -> None:
        """The consumer is at work: the lease begins anew, if it runs."""
        if entry.expires_at is not None and not entry.state.final:
            entry.expires_at = self._clock() + self._lease_s

    def pulled(self, entry: Entry) -> None:
        """A reader has been told everything."""
        self.renew(entry)
        if entry.state is State.READY:
            self._move(entry, State.PULLED)

    def release(self, ticket_id: str, epoch: int) -> Entry | None:
        """The consumer needs the blocks no more. Unknown tickets are fine, another epoch is refused with TICKET_NOT_FOUND."""
        entry = self._live(ticket_id)
        if entry is None:
            return None
        if entry.epoch != epoch:
            raise not_found(ticket_id, epoch, f"of epoch {entry.epoch}")
        return self._end(entry, State.RELEASED)

    def abort(self, ticket_id: str, error: TandemError) -> Entry | None:
        """The producer gives up; readers end with `error`."""
        entry = self._live(ticket_id)
        if entry is None:
            return None
        entry.error = error
        return self._end(entry, State.ABORTED)

    def expire(self) -> list[Entry]:
        """Ends the tickets whose lease is over and returns them."""
        now = self._clock()
        due = [entry for entry in self._entries.values() if not entry.state.final and _is_due(entry, now)]
        return [self._end(entry, State.EXPIRED) for entry in due]

    @property
    def next_expiry(self) -> float | None:
        """When `expire` has something to do, as of now; None if no lease runs."""
        running = (entry.expires_at for entry in self._entries.values() if not entry.state.final)
        return min((moment for moment in running if moment is not None), default=None)

    def _live(self, ticket_id: str) -> Entry | None:
        entry = self._entries.get(ticket_id)
        return None if entry is None or entry.state.final else entry

    def _move(self, entry: Entry, state: State) -> None:
        level = logging.INFO if state in (State.EXPIRED, State.ABORTED) else logging.DEBUG
        logger.log(level, "%s: %s, was %s", entry, state.value, entry.state.value)
        entry.state = state

    def _end(self, entry: Entry, state: State) -> Entry:
        self._move(entry, state)
        self._settle(entry)
        return entry

    def _settle(self, entry: Entry) -> None:
        """Frees the blocks once nothing stands against it; an entry leaves the ledger at that moment, so this happens once."""
        if entry.state.final and entry.num_readers == 0:
            del self._entries[entry.ticket_id]
            self._free(entry.block_ids)


def _is_due(entry: Entry, now: float) -> bool:
    return entry.expires_at is not None and entry.expires_at <= now


def not_found(ticket_id: str, epoch: int, why: str) -> TandemError:
    """The error for a ticket that cannot be pulled; the caller should prefill again."""
    metadata = {"ticket": ticket_id[:8], "epoch": str(epoch)}
    return TandemError(Reason.TICKET_NOT_FOUND, f"ticket {ticket_id[:8]} epoch {epoch} is {why}", metadata=metadata)

"""Tickets and their leases: who may still read which blocks, and when they are provably no longer needed."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.pulse import Pulse
from kvtransfer.states import State
from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)


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
    """Streams that tell consumers of it. They hold no block: whoever reads one finds out by its generation, or asks the ledger
    before each piece that it sends, whether it was still this ticket's."""
    expires_at: float | None = None
    """On the ledger's clock; None while the producer's own request holds the blocks."""

    def __str__(self) -> str:
        return f"ticket {self.ticket_id[:8]} epoch {self.epoch}"


class TicketLedger:
    """Every ticket from its grant until its blocks are freed.

    `free(block_ids)` is called exactly once for each ticket, when its state becomes final. Transitions may be repeated and may come
    late; one that no longer applies does nothing. `clock` gives seconds and never goes back. Not thread-safe, but for `pulse`.
    """

    def __init__(self, clock: Callable[[], float], lease_s: float, free: Callable[[Sequence[int]], None]) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._free = free
        self._entries: dict[str, Entry] = {}
        self.num_granted = 0
        self.num_ended = Counter[State]()
        """By final state."""
        self.num_stale = 0
        """Requests for tickets unknown, over, or of another epoch."""
        self.num_moves = 0
        """How often a ticket has come nearer to its end, or its consumer has asked for more time."""
        self.pulse = Pulse(clock)
        """Each beat of a consumer renews its ticket's lease."""

    @property
    def num_outstanding(self) -> int:
        """Tickets that are not over."""
        return len(self._entries)

    @property
    def ticket_ids(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def get(self, ticket_id: str) -> Entry | None:
        """None if the ticket is unknown or over."""
        return self._entries.get(ticket_id)

    def grant(self, ticket_id: str, epoch: int, block_ids: Sequence[int]) -> Entry:
        """Takes over one reference to each block."""
        assert ticket_id not in self._entries, "ticket ids are unique"
        entry = self._entries[ticket_id] = Entry(ticket_id, epoch, tuple(block_ids))
        self.pulse.watch(ticket_id, epoch)
        self.num_granted += 1
        logger.debug("%s: granted %d blocks", entry, len(entry.block_ids))
        return entry

    def progress(self, ticket_id: str, num_ready_blocks: int) -> Entry | None:
        """The first `num_ready_blocks` blocks will not change any more. None if the ticket is over, else its entry."""
        entry = self.get(ticket_id)
        if entry is not None and num_ready_blocks > entry.num_ready_blocks:
            assert num_ready_blocks <= len(entry.block_ids), "more blocks are ready than were granted"
            entry.num_ready_blocks = num_ready_blocks
            if entry.state is State.GRANTED:
                self._move(entry, State.FILLING)
        return entry

    def finish(self, ticket_id: str, first_token_id: int) -> Entry | None:
        """All blocks are ready, the first token is known; the lease begins. None if the ticket is over, else its entry."""
        entry = self.get(ticket_id)
        if entry is not None and entry.first_token_id is None:
            entry.num_ready_blocks = len(entry.block_ids)
            entry.first_token_id = first_token_id
            entry.expires_at = self._clock() + self._lease_s
            self._move(entry, State.READY)
        return entry

    def open(self, ticket_id: str, epoch: int) -> Entry:
        """Adds a reader, who must `close`. Raises TICKET_NOT_FOUND if the ticket is unknown, over, or of another epoch."""
        entry = self.get(ticket_id)
        if entry is None or entry.epoch != epoch:
            self.num_stale += 1
            raise not_found(ticket_id, epoch, "unknown or over" if entry is None else f"of epoch {entry.epoch}")
        entry.num_readers += 1
        self.pulse.opened(ticket_id)
        self._renew(entry, self._clock())
        return entry

    def close(self, entry: Entry) -> None:
        """Takes a reader away."""
        assert entry.num_readers > 0, "a reader closed twice"
        entry.num_readers -= 1

    def silent(self, limit_s: float) -> list[Entry]:
        """Tickets with a reader whose consumer has fallen silent for so long after it had begun to beat."""
        latest = self._clock() - limit_s
        return [entry for entry in self._entries.values() if entry.num_readers and _before(self._heard_at(entry), latest)]

    def pulled(self, entry: Entry) -> None:
        """A reader has been told everything."""
        if entry.state is State.READY:
            self._move(entry, State.PULLED)

    def release(self, ticket_id: str, epoch: int) -> Entry | None:
        """The consumer needs the blocks no more. Unknown tickets are fine, another epoch is refused with TICKET_NOT_FOUND."""
        entry = self.get(ticket_id)
        if entry is None:
            return None
        if entry.epoch != epoch:
            self.num_stale += 1
            raise not_found(ticket_id, epoch, f"of epoch {entry.epoch}")
        return self._end(entry, State.RELEASED)

    def abort(self, ticket_id: str, error: TandemError) -> Entry | None:
        """The producer gives up; readers end with `error`."""
        entry = self.get(ticket_id)
        if entry is None:
            return None
        entry.error = error
        return self._end(entry, State.ABORTED)

    def expire(self) -> list[Entry]:
        """Ends the tickets whose lease is over and returns them."""
        for entry in self._entries.values():
            heard_at = self._heard_at(entry)
            if heard_at is not None:
                self._renew(entry, heard_at)
        now = self._clock()
        due = [entry for entry in self._entries.values() if entry.expires_at is not None and entry.expires_at <= now]
        return [self._end(entry, State.EXPIRED) for entry in due]

    @property
    def next_expiry(self) -> float | None:
        """When `expire` has something to do, as of now; None if no lease runs."""
        running = (entry.expires_at for entry in self._entries.values())
        return min((moment for moment in running if moment is not None), default=None)

    def _heard_at(self, entry: Entry) -> float | None:
        return self.pulse.heard_at(entry.ticket_id)

    def _renew(self, entry: Entry, moment: float) -> None:
        if entry.expires_at is not None and moment + self._lease_s > entry.expires_at:
            entry.expires_at = moment + self._lease_s
            self.num_moves += 1

    def _move(self, entry: Entry, state: State) -> None:
        level = logging.INFO if state in (State.EXPIRED, State.ABORTED) else logging.DEBUG
        logger.log(level, "%s: %s, was %s", entry, state.value, entry.state.value)
        entry.state = state
        self.num_moves += 1

    def _end(self, entry: Entry, state: State) -> Entry:
        """An entry leaves the ledger at the moment that its blocks are freed, so this happens once."""
        self._move(entry, state)
        self.num_ended[state] += 1
        del self._entries[entry.ticket_id]
        self.pulse.forget(entry.ticket_id)
        self._free(entry.block_ids)
        return entry


def _before(moment: float | None, latest: float) -> bool:
    return moment is not None and moment < latest


def not_found(ticket_id: str, epoch: int, why: str) -> TandemError:
    """The error for a ticket that cannot be pulled; the caller should prefill again."""
    metadata = {"ticket": ticket_id[:8], "epoch": str(epoch)}
    return TandemError(Reason.TICKET_NOT_FOUND, f"ticket {ticket_id[:8]} epoch {epoch} is {why}", metadata=metadata)

"""A ticket at its consumer: what has arrived, what may be tried again, and how it ended. Pure bookkeeping."""

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvtransfer.states import State
from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)

MAX_REFETCHES = 2
MAX_RESUMES = 1

_ORDER = (State.GRANTED, State.FILLING, State.READY, State.PULLED)


class DamagedBlockError(Exception):
    """A block's bytes do not have the checksum that was announced."""

    def __init__(self, index: int) -> None:
        super().__init__(f"block {index} of the ticket is damaged")
        self.index = index


class InterruptedPullError(Exception):
    """The producer stopped sending before the end; what is verified by then is good."""


class StalledPullError(InterruptedPullError):
    """The producer is connected but silent: frozen, or cut off without a word. Asking it again would only double the wait."""


class PullState:
    """One ticket's pull. Transitions may be repeated, and do nothing once the state is final.

    `clock` gives seconds and never goes back.
    """

    def __init__(self, ticket_id: str, epoch: int, num_blocks: int, clock: Callable[[], float]) -> None:
        self.ticket_id = ticket_id
        self.epoch = epoch
        self.state = State.GRANTED
        self.began_at = 0.0
        """When the first block was told; 0 before."""
        self.ended_at = 0.0
        """When all blocks were here; 0 before."""
        self.num_refetched = 0
        self.num_resumed = 0
        self._clock = clock
        self._verified = np.zeros(num_blocks + 1, np.bool_)  # the last never is
        self._refetches: dict[int, int] = {}

    def __str__(self) -> str:
        return f"ticket {self.ticket_id[:8]} epoch {self.epoch}"

    @property
    def num_verified(self) -> int:
        """Blocks from the first on that are verified."""
        return int(self._verified.argmin())

    def begin_attempt(self) -> None:
        """Blocks after the first unverified one will be written again, so what is known of them no longer counts."""
        self._verified[self.num_verified :] = False

    def filling(self) -> None:
        """Blocks are told."""
        self.began_at = self.began_at or self._clock()
        self._advance(State.FILLING)

    def verified(self, first: int, good: npt.NDArray[np.bool_]) -> None:
        """Of the blocks from `first` on those that are `good`."""
        self._verified[first : first + len(good)] |= good

    def ready(self) -> None:
        """Every block was told."""
        self._advance(State.READY)

    def pulled(self) -> None:
        """Every block is here; they may be used from now on."""
        assert self.num_verified == len(self._verified) - 1, "a block is used that was not verified"
        self.began_at = self.began_at or self._clock()
        self.ended_at = self.ended_at or self._clock()
        self._advance(State.PULLED)

    def release(self) -> None:
        self._end(State.RELEASED)

    def expire(self) -> None:
        """The producer, or this side's clock, says that the lease is over."""
        self._end(State.EXPIRED)

    def abort(self) -> None:
        """Cancelled, or given up."""
        self._end(State.ABORTED)

    def damaged(self, error: DamagedBlockError) -> None:
        """Lets the block be fetched again, or raises KV_CHECKSUM_MISMATCH if that was done often enough."""
        times = self._refetches.get(error.index, 0)
        if times == MAX_REFETCHES:
            message = f"block {error.index} of the ticket arrived damaged {times + 1} times"
            raise TandemError(Reason.KV_CHECKSUM_MISMATCH, message, metadata={"block_index": str(error.index)}) from error
        self._refetches[error.index] = times + 1
        self.num_refetched += 1

    def interrupted(self, error: InterruptedPullError) -> None:
        """Lets the pull be resumed, or raises TRANSFER_INTERRUPTED if that was done already, or is of no use."""
        if self.num_resumed == MAX_RESUMES or isinstance(error, StalledPullError):
            metadata = {"verified_blocks": str(self.num_verified), "resumed": str(self.num_resumed)}
            raise TandemError(Reason.TRANSFER_INTERRUPTED, f"the transfer was cut: {error}", metadata=metadata) from error
        self.num_resumed += 1

    def _advance(self, state: State) -> None:
        if not self.state.final and _ORDER.index(state) > _ORDER.index(self.state):
            self._move(state)

    def _end(self, state: State) -> None:
        if not self.state.final:
            self._move(state)

    def _move(self, state: State) -> None:
        level = logging.INFO if state in (State.EXPIRED, State.ABORTED) else logging.DEBUG
        logger.log(level, "%s at its consumer: %s, was %s", self, state.value, self.state.value)
        self.state = state


class PulledTickets:
    """Pulled tickets until they are released, or until their lease is over by this side's clock: whatever comes first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._states: dict[str, tuple[PullState, float]] = {}

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, state: PullState, lease_s: float) -> None:
        now = self._clock()
        for ticket_id in [key for key, (_, expires_at) in self._states.items() if expires_at <= now]:
            self._states.pop(ticket_id)[0].expire()
        self._states[state.ticket_id] = (state, now + lease_s)

    def release(self, ticket_id: str, epoch: int) -> bool:
        """Whether that very ticket was pulled."""
        if ticket_id not in self._states:
            return False
        state, _ = self._states.pop(ticket_id)
        state.release()
        return state.epoch == epoch

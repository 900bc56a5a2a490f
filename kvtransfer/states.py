"""The life of a ticket, as either side sees it."""

from enum import Enum


class State(Enum):
    """Where a ticket stands. The last three are final."""

    GRANTED = "granted"  # its blocks are allocated, here and there
    FILLING = "filling"  # some are ready; at the consumer: some were told
    READY = "ready"  # all are ready, and the first token is drawn; from now on the lease runs
    PULLED = "pulled"  # a consumer has been told everything; at the consumer: every block is here and verified
    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"

    @property
    def final(self) -> bool:
        return self in (State.RELEASED, State.EXPIRED, State.ABORTED)

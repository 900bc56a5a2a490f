"""When the consumer of each live ticket was last heard of."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Watched:
    epoch: int
    heard_at: float | None = None


class Pulse:
    """Written by the heartbeat thread, read by the ledger on the event loop: the only state of a ticket that two threads share.

    Only the consumer's own word counts: that a kernel took some bytes for it, or that its connection stands, proves nothing.
    `clock` is the ledger's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()

    def watch(self, ticket_id: str, epoch: int) -> None:
        with self._lock:
            self._watched[ticket_id] = _Watched(epoch)

    def forget(self, ticket_id: str) -> None:
        with self._lock:
            del self._watched[ticket_id]

    def beat(self, ticket_id: str, epoch: int) -> bool:
        """The ticket's consumer lives. False if there is no such ticket any more: whoever says so pulls what is over."""
        with self._lock:
            watched = self._watched.get(ticket_id)
            if watched is None or watched.epoch != epoch:
                return False
            watched.heard_at = self._clock()
            return True

    def heard_at(self, ticket_id: str) -> float | None:
        """None if no consumer has ever beaten for it, or it is over."""
        with self._lock:
            watched = self._watched.get(ticket_id)
            return None if watched is None else watched.heard_at

    def opened(self, ticket_id: str) -> None:
        """A reader comes: as good as a beat, if there were any. The first beat may come before its stream, or after."""
        with self._lock:
            watched = self._watched[ticket_id]
            if watched.heard_at is not None:
                watched.heard_at = self._clock()

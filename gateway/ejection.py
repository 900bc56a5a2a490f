"""Addresses whose workers fail again and again are left in peace for a while. Pure policy."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.routing import Worker

# Failures closer together than this are one: a worker's end breaks all of its streams at once.
ONE_FAILURE_S = 0.5
# The first failure costs nothing, the second this long, each further one twice as long.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
# An address that has not failed for so long begins anew.
FORGOTTEN_AFTER_S = 30.0


@dataclass
class _Record:
    num_failures: int = 0
    failed_at: float = float("-inf")
    ejected_until: float = float("-inf")


class Ejector:
    """Remembers failures by address, since a worker that crashes comes back under another id.

    An ejected address is the last choice, not a forbidden one: with nothing else left it is used.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self.num_ejections = 0

    def failed(self, address: str) -> None:
        """A worker at this address broke a request, or crashed."""
        now = self._clock()
        self._forget(now)
        record = self._records.setdefault(address, _Record())
        since_s = now - record.failed_at
        if since_s < ONE_FAILURE_S:
            return
        quiet_s = now - max(record.failed_at, record.ejected_until)
        record.num_failures = 1 if quiet_s > FORGOTTEN_AFTER_S else record.num_failures + 1
        record.failed_at = now
        if record.num_failures > 1:
            pause_s = min(FIRST_PAUSE_S * 2.0 ** (record.num_failures - 2), LONGEST_PAUSE_S)
            record.ejected_until = now + pause_s
            self.num_ejections += 1

    def _forget(self, now: float) -> None:
        """Addresses come and go."""
        for address, record in list(self._records.items()):
            if now - max(record.failed_at, record.ejected_until) > FORGOTTEN_AFTER_S:
                del self._records[address]

    def lost(self, worker: Worker) -> None:
        """A worker went away. One that had said before that it takes no more requests has ended in order."""
        if worker.ready:
            self.failed(worker.address)

    def ejected(self, address: str) -> bool:
        record = self._records.get(address)
        return record is not None and self._clock() < record.ejected_until

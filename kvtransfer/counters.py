"""What happened at the hand-off, in numbers: for the worker's status, and for tests that nothing is lost silently."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial

from tandem.errors import Reason, TandemError


@dataclass(frozen=True)
class ProducerCounters:
    """One producer's tickets since its start. granted == released + expired + aborted + those outstanding."""

    granted: int
    released: int
    expired: int
    aborted: int
    stale: int
    """Requests for tickets that were unknown, over, or of another epoch."""
    silenced: int
    """Tickets whose streams were ended because their consumer had fallen silent."""
    refused_connections: int
    """Connections that sent something that is not of the protocol, or were too many."""


@dataclass(frozen=True)
class PullCounters:
    """What one consumer pulled from one producer by one transport. A pull ends as pulled, stale, damaged, interrupted or neither
    (cancelled, refused, or ended by the producer's own error)."""

    producer_id: str
    transport: str
    pulled: int = 0
    """Pulls that arrived whole."""
    pulled_blocks: int = 0
    refetched: int = 0
    """Blocks that were asked for again."""
    checksum_failures: int = 0
    """Blocks whose bytes did not have their checksum."""
    stale: int = 0
    """Pulls that found their ticket over, or a block of it in other use."""
    damaged: int = 0
    """Pulls given up because a block stayed damaged."""
    resumed: int = 0
    """Times that a cut transfer was taken up again."""
    interrupted: int = 0
    """Pulls given up because the producer was lost, fell silent, or was cut off twice."""


class PullTally:
    """Counts per producer and transport. On the event loop. Producers come and go, so the oldest are merged under the id ""."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._counts: dict[tuple[str, str], dict[str, int]] = {}

    def add(self, producer_id: str, transport: str, **counts: int) -> None:
        row = self._row(producer_id, transport)
        for name, count in counts.items():
            assert name in _COUNTED, f"{name} is not counted"
            row[name] += count

    @contextmanager
    def ending(self, producer_id: str, transport: str) -> Iterator[Callable[..., None]]:
        """Gives what adds counts, and counts the error that a pull ends with."""
        try:
            yield partial(self.add, producer_id, transport)
        except TandemError as error:
            if error.reason in _ENDINGS:
                self.add(producer_id, transport, **{_ENDINGS[error.reason]: 1})
            raise

    def rows(self) -> tuple[PullCounters, ...]:
        return tuple(replace(PullCounters(*key), **row) for key, row in self._counts.items())  # type: ignore[arg-type]

    def _row(self, producer_id: str, transport: str) -> dict[str, int]:
        key = (producer_id, transport)
        if key not in self._counts:
            if len(self._counts) >= self._most and producer_id:
                self._merge_oldest()
            self._counts[key] = defaultdict(int)
        return self._counts[key]

    def _merge_oldest(self) -> None:
        key = next(each for each in self._counts if each[0])
        self.add("", key[1], **self._counts.pop(key))


_ENDINGS = {
    Reason.TICKET_NOT_FOUND: "stale",
    Reason.KV_CHECKSUM_MISMATCH: "damaged",
    Reason.TRANSFER_INTERRUPTED: "interrupted",
}
_COUNTED = {field.name for field in fields(PullCounters)} - {"producer_id", "transport"}

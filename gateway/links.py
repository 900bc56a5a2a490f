"""Pairs of a prefill and a decode worker between which a hand-off broke: all requests avoid them for a while. Pure policy.

Which transport it was is the workers' business, since they choose it: what counts is whether blocks get from one to the other.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from gateway.routing import Pair

# A pair is avoided for so long after a hand-off broke, twice as long each time that a probe breaks, too.
FIRST_PAUSE_S = 4.0
LONGEST_PAUSE_S = 30.0
# The first request after that is the probe; the others wait so long for its outcome.
PROBE_S = 2.0
MAX_REMEMBERED = 1024


@dataclass
class _Record:
    avoided_until: float
    pause_s: float = FIRST_PAUSE_S
    probing: bool = False


class Links:
    """Remembers pairs by worker ids: a worker that has restarted begins anew. An avoided pair is the last choice, never
    a forbidden one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: OrderedDict[Pair, _Record] = OrderedDict()

    @property
    def avoided(self) -> frozenset[Pair]:
        """To be used only if there is no other."""
        now = self._clock()
        return frozenset(pair for pair, record in self._records.items() if now < record.avoided_until)

    def chosen(self, pair: Pair) -> None:
        """A request goes to a pair. If its pause is over, this is the probe."""
        record, now = self._records.get(pair), self._clock()
        if record is not None and now >= record.avoided_until:
            record.probing, record.avoided_until = True, now + PROBE_S

    def broke(self, pair: Pair) -> None:
        """Requests that were under way when it broke first make nothing worse."""
        record = self._records.setdefault(pair, _Record(0.0))
        if record.probing:
            record.pause_s, record.probing = min(record.pause_s * 2, LONGEST_PAUSE_S), False
        record.avoided_until = self._clock() + record.pause_s
        self._records.move_to_end(pair)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)

    def passed(self, pair: Pair) -> None:
        """Blocks have come across."""
        self._records.pop(pair, None)

"""What the failure of an attempt means: ask another worker, try once more, or give up. Pure policy, one `Recovery` per request.

- A worker that refuses, or never took the request, costs nothing: the next one is asked. A request that has delivered nothing gets
  the refusal itself once nobody is left.
- A hop that breaks while it holds the request is tried once more, on other workers if there are any. Each time the hop is passed it
  earns that one retry anew, so that a long completion survives many honest losses.
- Two workers that die in a row under the same hop of one request are its doing: it fails alone, and is not taken again for a while.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from gateway.routing import Worker
from tandem.errors import Reason, TandemError

# Workers in a row that may die, or hand-offs that may break, before it is taken to be the request's own fault.
MAX_BREAKS_IN_A_ROW = 2
# However much is delivered in between.
MAX_BREAKS = 6


class Hop(Enum):
    """The parts of an attempt, in their order; each is passed before the next can be."""

    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"


# The worker is as it was, and so is what it was offered.
REFUSALS = frozenset({Reason.QUEUE_FULL, Reason.KV_BLOCKS_EXHAUSTED, Reason.POOL_TOO_SMALL, Reason.DRAINING, Reason.LOADING})
# The blocks did not come across, whoever's fault that is.
HANDOFF_BREAKS = frozenset({Reason.TICKET_NOT_FOUND, Reason.KV_CHECKSUM_MISMATCH, Reason.TRANSFER_INTERRUPTED})
# The worker's process, or its engine, is gone.
DEATHS = frozenset({Reason.WORKER_LOST, Reason.ENGINE_FAILED, Reason.CANCELLED, Reason.STREAM_BROKEN})
# The worker does not keep the contract.
_NONSENSE = frozenset({Reason.INTERNAL, Reason.UNKNOWN_SERVICE, Reason.UNIMPLEMENTED})

LOSSES = DEATHS | HANDOFF_BREAKS | {Reason.UNKNOWN_SERVICE, Reason.UNIMPLEMENTED}
"""What a user hears of as a lost worker."""


@dataclass
class HopFailed(Exception):
    """One leg ended an attempt. `workers` were involved, the last to be asked first; `held` if it had taken the request."""

    hop: Hop
    workers: tuple[Worker, ...]
    error: TandemError
    held: bool

    @property
    def refused(self) -> bool:
        return self.error.reason in REFUSALS

    @property
    def broken(self) -> bool:
        return self.error.reason in DEATHS | HANDOFF_BREAKS | _NONSENSE

    @property
    def death(self) -> bool:
        return self.error.reason in DEATHS


@dataclass
class Recovery:
    """What one request has been through. Holds worker ids: a worker that has restarted is another one."""

    tried: set[str] = field(default_factory=set)
    """Not to be asked again before the others have been, and some time has passed."""
    avoided: set[str] = field(default_factory=set)
    """To be asked only if there is no other."""
    prefill_address: str = ""
    """The prefill worker that has the prompt in its cache."""
    waited_s: float = 0.0
    """For a worker, since the last token of a decode worker."""
    num_breaks: int = 0
    dead: set[str] = field(default_factory=set)
    last: HopFailed | None = None
    _in_a_row: dict[Hop, list[str]] = field(default_factory=lambda: defaultdict(list))

    def failed(self, failure: HopFailed, passed: Collection[Hop]) -> None:
        """Takes note of an attempt's failure, and of the hops that it had passed. Raises the TandemError that ends the request."""
        self.last = failure
        self._passed(passed)
        ids = {worker.worker_id for worker in failure.workers}
        self.avoided |= ids
        if failure.refused:
            self.tried |= ids
        elif failure.broken:
            self._broke(failure)
        else:
            raise failure.error

    def _passed(self, hops: Collection[Hop]) -> None:
        for hop in hops:
            self._in_a_row[hop].clear()
        if Hop.DECODE in hops:
            self.waited_s = 0.0

    def suspected(self, hop: Hop) -> bool:
        """Whether a worker has died under this hop, which the request has not passed since."""
        return bool(self._in_a_row[hop])

    def new_round(self) -> None:
        """Some time has passed: those that could not take the request may be asked again."""
        self.tried.clear()

    def _broke(self, failure: HopFailed) -> None:
        culprit = failure.workers[0].worker_id
        self.num_breaks += 1
        if failure.death:
            self.dead.add(culprit)
        if failure.hop is not Hop.HANDOFF:
            self.tried.add(culprit)
        in_a_row = self._in_a_row[failure.hop]
        cut_off = failure.error.reason is Reason.WORKER_LOST and culprit in in_a_row  # it cannot have died twice
        if failure.held and not cut_off:
            in_a_row.append(culprit)
        if len(in_a_row) < MAX_BREAKS_IN_A_ROW and self.num_breaks < MAX_BREAKS:
            return
        raise self._blame(failure) if failure.death and len(self.dead) >= MAX_BREAKS_IN_A_ROW else failure.error

    def _blame(self, failure: HopFailed) -> TandemError:
        message = f"{len(self.dead)} workers were lost while they ran this request; it is not taken again for a while"
        metadata = {"worker_deaths": str(len(self.dead)), "cause": failure.error.reason.value}
        return TandemError(Reason.REQUEST_QUARANTINED, message, metadata=metadata)

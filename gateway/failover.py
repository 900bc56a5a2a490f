"""What the failure of an attempt means: ask another worker, try once more, or give up. Pure policy, one `Recovery` per request.

- A worker that refuses, or never took the request, costs nothing: the next one is asked. A request that has delivered nothing gets
  the refusal itself once nobody is left.
- A worker that is lost while it holds the request is left for another, and so is a pair whose hand-off breaks: each pair is a hop
  of its own, tried once more. Six such moves without a token of a decode worker in between are the end.
- A hop whose engine fails, or whose worker does not keep the contract, is tried once more. Each time the hop is passed it earns
  that one retry anew, so that a long completion survives many honest failures.
- Two workers that die in a row under the same hop of one request are its doing: it fails alone, and is not taken again for a while.
  Only what is proved counts as a death (gateway/losses.py): a worker that is silent, stalled or cut off has not died.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

from gateway.routing import Pair, Worker
from tandem.errors import Reason, TandemError

# Workers that may die or fail in a row at one hop before it is taken to be the request's own fault, and so often may the hand-off
# of one pair break.
MAX_FAILURES_IN_A_ROW = 2
# However much is delivered in between.
MAX_FAILURES = 6
# Breaks of any kind until a decode worker gives a token.
MAX_MOVES = 6


class Hop(Enum):
    """The parts of an attempt, in their order; each is passed before the next can be."""

    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"


# The worker is as it was, and so is what it was offered.
REFUSALS = frozenset({Reason.QUEUE_FULL, Reason.KV_BLOCKS_EXHAUSTED, Reason.POOL_TOO_SMALL, Reason.DRAINING, Reason.LOADING})
# The blocks did not come across, whoever's fault that is.
HANDOFF_BREAKS = frozenset({Reason.TICKET_NOT_FOUND, Reason.KV_CHECKSUM_MISMATCH, Reason.TRANSFER_INTERRUPTED})
# Nothing more is heard of the worker, or of this call; its process may have ended.
DISAPPEARANCES = frozenset({Reason.WORKER_LOST, Reason.CANCELLED, Reason.STREAM_BROKEN})
# The worker does not keep the contract.
_NONSENSE = frozenset({Reason.INTERNAL, Reason.UNKNOWN_SERVICE, Reason.UNIMPLEMENTED})

LOSSES = DISAPPEARANCES | HANDOFF_BREAKS | {Reason.ENGINE_FAILED, Reason.UNKNOWN_SERVICE, Reason.UNIMPLEMENTED}
"""What a user hears of as a lost worker."""


@dataclass
class HopFailed(Exception):
    """One leg ended an attempt. `workers` were involved, the last to be asked first. `held`: it had the request in hand; of a
    hand-off, the prefill worker had, since the prompt was not computed yet."""

    hop: Hop
    workers: tuple[Worker, ...]
    error: TandemError
    held: bool

    @property
    def refused(self) -> bool:
        return self.error.reason in REFUSALS

    @property
    def pair(self) -> Pair | None:
        """Between which the hand-off broke."""
        return (self.workers[1].worker_id, self.workers[0].worker_id) if self.hop is Hop.HANDOFF else None

    @property
    def suspected(self) -> tuple[Hop, Worker] | None:
        """The worker that may have died of the request, and at which hop. That its blocks stop coming may be the first that is
        heard of a prefill worker's death."""
        if not self.held:
            return None
        return (Hop.PREFILL, self.workers[1]) if self.hop is Hop.HANDOFF else (self.hop, self.workers[0])

    @property
    def told(self) -> bool:
        """Whether the worker itself said what went wrong with it."""
        return self.hop is not Hop.HANDOFF and not self.disappeared

    @property
    def disappeared(self) -> bool:
        return self.error.reason in DISAPPEARANCES

    @property
    def broken(self) -> bool:
        return self.disappeared or self.error.reason in HANDOFF_BREAKS | _NONSENSE | {Reason.ENGINE_FAILED}


@dataclass
class Loss:
    """Whether a worker that disappeared has died: None as long as that is open."""

    ended: bool | None = None


@dataclass(frozen=True)
class _Break:
    """Of a hop that held the request. `failed`: the worker told so itself; otherwise `loss` tells what became of it."""

    worker_id: str
    failed: bool
    loss: Loss

    @property
    def counts(self) -> bool:
        return self.failed or self.loss.ended is True


@dataclass
class Recovery:
    """What one request has been through. Holds worker ids: a worker that has restarted is another one."""

    tried: set[str] = field(default_factory=set)
    """Not to be asked again before the others have been, and some time has passed."""
    tried_pairs: set[Pair] = field(default_factory=set)
    """The same, of pairs whose hand-off broke twice in a row."""
    avoided: set[str] = field(default_factory=set)
    """To be asked only if there is no other."""
    prefill_address: str = ""
    """The prefill worker that has the prompt in its cache."""
    waited_s: float = 0.0
    """For a worker, since the last token of a decode worker."""
    last: HopFailed | None = None
    _num_moves: int = 0
    _broken_pairs: Counter[Pair] = field(default_factory=Counter)
    """In a row."""
    _breaks: list[_Break] = field(default_factory=list)
    """While the request was held, over all of its life."""
    _in_a_row: dict[Hop, list[_Break]] = field(default_factory=lambda: defaultdict(list))

    def passed(self, hops: Collection[Hop]) -> None:
        """An attempt has got past these hops, whatever became of it then."""
        for hop in hops:
            self._in_a_row[hop].clear()
        if Hop.HANDOFF in hops:
            self._broken_pairs.clear()
        if Hop.DECODE in hops:
            self.waited_s, self._num_moves = 0.0, 0

    def failed(self, failure: HopFailed, loss: Loss) -> None:
        """Takes note of an attempt's failure. Raises the TandemError that ends the request."""
        self.last = failure
        ids = {worker.worker_id for worker in failure.workers}
        self.avoided |= ids
        if failure.refused:
            self.tried |= ids
        elif failure.broken:
            self._broke(failure, loss)
        else:
            raise failure.error

    def suspects(self, hop: Hop) -> list[Loss]:
        """Workers that have died under this hop, or may have, and that the request has not passed since."""
        return [each.loss for each in self._in_a_row[hop] if each.failed or each.loss.ended is not False]

    def new_round(self) -> None:
        """Some time has passed: those that could not take the request may be asked again."""
        self.tried.clear()
        self.tried_pairs.clear()

    def _broke(self, failure: HopFailed, loss: Loss) -> None:
        self._num_moves += 1
        hop, worker = failure.suspected or (failure.hop, None)
        if failure.pair is not None:
            self._broken_pairs[failure.pair] += 1
            if self._broken_pairs[failure.pair] >= MAX_FAILURES_IN_A_ROW:
                self.tried_pairs.add(failure.pair)
        else:
            self.tried.add(failure.workers[0].worker_id)
        in_a_row = self._in_a_row[hop]
        if worker is not None:
            self._note(in_a_row, worker, failure, loss)
        if len(dead := _dead(in_a_row)) >= MAX_FAILURES_IN_A_ROW or len(dead := _dead(self._breaks)) >= MAX_FAILURES:
            raise _blame(dead, failure)
        if self._used_up(in_a_row):
            raise failure.error

    def _note(self, in_a_row: list[_Break], worker: Worker, failure: HopFailed, loss: Loss) -> None:
        if failure.told:
            loss = Loss(ended=failure.error.reason is Reason.ENGINE_FAILED)
        broken = _Break(worker.worker_id, failure.told, loss)
        self._breaks.append(broken)
        in_a_row.append(broken)

    def _used_up(self, in_a_row: Iterable[_Break]) -> bool:
        return (
            sum(each.counts for each in in_a_row) >= MAX_FAILURES_IN_A_ROW
            or sum(each.counts for each in self._breaks) >= MAX_FAILURES
            or self._num_moves >= MAX_MOVES
        )


def _dead(breaks: Iterable[_Break]) -> set[str]:
    """Workers whose process or engine has ended. A worker that is cut off twice has not died twice."""
    return {each.worker_id for each in breaks if each.loss.ended}


def _blame(dead: Collection[str], failure: HopFailed) -> TandemError:
    message = f"{len(dead)} workers died while they ran this request; it is not taken again for a while"
    metadata = {"worker_deaths": str(len(dead)), "cause": failure.error.reason.value}
    return TandemError(Reason.REQUEST_QUARANTINED, message, metadata=metadata)

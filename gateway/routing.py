"""Which workers take a request: a pure policy over what workers last said and what was sent to them since."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from tandem.errors import Reason, TandemError


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


class Condition(Enum):
    """Whether a worker takes requests, and if not, why; the numbers of WorkerCondition."""

    UNKNOWN = 0
    SERVING = 1
    DRAINING = 2
    STALLED = 3

    @classmethod
    def _missing_(cls, value: object) -> "Condition":
        return cls.UNKNOWN  # a newer worker's


@dataclass(frozen=True)
class RequestCounts:
    """How a worker's requests ended; see RequestCounts in operations.proto."""

    received: int = 0
    ok: int = 0
    cancelled: int = 0
    rejected: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Layout:
    """The shape of a worker's KV blocks. Blocks can only travel between equal shapes. `dtype` is the number of KvDtype."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: int
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0


@dataclass(frozen=True)
class Worker:
    """A worker as it last described itself; see WatchResponse in status.proto. `ready` is false while it cannot be reached."""

    address: str
    role: Role
    worker_id: str = ""
    ready: bool = False
    model_digest: str = ""
    tokenizer_digest: str = ""
    layout: Layout | None = None
    device: str = ""
    weight_format: str = ""
    weight_format_reason: str = ""
    transports: tuple[str, ...] = ()
    total_blocks: int = 0
    free_blocks: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    running_requests: int = 0
    max_requests: int = 0
    tokens_per_second: float = 0.0
    condition: Condition = Condition.UNKNOWN
    requests: RequestCounts = RequestCounts()

    @property
    def pool_tokens(self) -> int:
        """Tokens whose KV fits the worker when nothing else is there."""
        return 0 if self.layout is None else self.total_blocks * self.layout.block_tokens


Pair = tuple[str, str]
"""The ids of a prefill and a decode worker."""


@dataclass(frozen=True)
class Wishes:
    """Addresses to leave out, addresses to use only if there is no other, and the prefill worker to take if it is as good as any,
    because it has the request's prefix in its cache. The same for pairs."""

    without: Collection[str] = frozenset()
    avoided: Collection[str] = frozenset()
    preferred: str = ""
    without_pairs: Collection[Pair] = frozenset()
    avoided_pairs: Collection[Pair] = frozenset()


@dataclass(frozen=True)
class Placement:
    """The pair that serves a request."""

    prefill: Worker
    decode: Worker

    @property
    def pair(self) -> Pair:
        return self.prefill.worker_id, self.decode.worker_id


@dataclass(frozen=True)
class Placed:
    """A placement that is counted; `prefill_arrived` and `decode_arrived` are called once the worker has answered."""

    placement: Placement
    prefill_arrived: Callable[[], None]
    decode_arrived: Callable[[], None]


@dataclass(eq=False)
class _Sent:
    """A request sent to a worker. Once it has `arrived`, the worker's next word counts it."""

    num_tokens: int
    arrived: bool = False


@dataclass
class _Pending:
    sent: list[_Sent] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.sent)


class PlacementLedger:
    """Counts what was sent to each worker since it last spoke, so that a burst spreads before workers can report it."""

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}

    @contextmanager
    def sending(self, address: str, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts a request for as long as the worker cannot; gives what to call once the worker has answered for the first time."""
        request = _Sent(num_tokens)
        pending = self._pending.setdefault(address, _Pending())
        pending.sent.append(request)
        try:
            yield lambda: setattr(request, "arrived", True)
        finally:
            if request in pending.sent:
                pending.sent.remove(request)
            if not pending.sent and self._pending.get(address) is pending:
                del self._pending[address]  # addresses come and go

    @contextmanager
    def placed(self, placement: Placement, num_tokens: int) -> Iterator[Placed]:
        """Counts a request at both of its workers."""
        with (
            self.sending(placement.prefill.address, num_tokens) as prefill_arrived,
            self.sending(placement.decode.address, num_tokens) as decode_arrived,
        ):
            yield Placed(placement, prefill_arrived, decode_arrived)

    def heard(self, address: str) -> None:
        """A worker spoke: what had arrived by then is in its own numbers."""
        pending = self._pending.get(address)
        if pending is not None:
            pending.sent[:] = [request for request in pending.sent if not request.arrived]

    def num_requests(self, address: str) -> int:
        pending = self._pending.get(address)
        return 0 if pending is None else len(pending.sent)

    def num_tokens(self, address: str) -> int:
        pending = self._pending.get(address)
        return 0 if pending is None else pending.num_tokens


def choose(
    workers: Collection[Worker], model_digest: str, num_tokens: int, ledger: PlacementLedger, wishes: Wishes = Wishes()
) -> Placement:
    """The least loaded pair whose KV blocks fit each other; equal loads are decided by address. Raises NO_WORKER, saying why."""
    prefills = usable(workers, Role.PREFILL, model_digest, wishes.without)
    decodes = usable(workers, Role.DECODE, model_digest, wishes.without)
    if not prefills or not decodes:
        raise _no_worker(workers, Role.DECODE if prefills else Role.PREFILL, model_digest, wishes)
    partners = {worker.address: partners_of(worker, decodes, wishes) for worker in prefills}
    fitting = [worker for worker in prefills if partners[worker.address]]
    if not fitting:
        raise TandemError(Reason.NO_WORKER, _no_pair(prefills, decodes))
    speeds = [worker.tokens_per_second for worker in fitting]
    prefill = min(
        fitting,
        key=lambda worker: (
            all((worker.worker_id, partner.worker_id) in wishes.avoided_pairs for partner in partners[worker.address]),
            worker.address in wishes.avoided,
            _is_full(worker, ledger),
            worker.address != wishes.preferred,
            _prefill_seconds(worker, num_tokens, max(speeds), ledger),
            worker.address,
        ),
    )
    return Placement(prefill, choose_decode(prefill, partners[prefill.address], num_tokens, ledger, wishes))


def partners_of(prefill: Worker, decodes: Collection[Worker], wishes: Wishes = Wishes()) -> list[Worker]:
    """Decode workers that may take over from a prefill worker: blocks only travel between equal layouts."""
    return [
        worker
        for worker in decodes
        if worker.layout == prefill.layout and (prefill.worker_id, worker.worker_id) not in wishes.without_pairs
    ]


def choose_decode(
    prefill: Worker, partners: Sequence[Worker], num_tokens: int, ledger: PlacementLedger, wishes: Wishes = Wishes()
) -> Worker:
    """The least loaded of the decode workers, at least one, that may take over from a prefill worker."""
    return min(
        partners,
        key=lambda worker: (
            (prefill.worker_id, worker.worker_id) in wishes.avoided_pairs,
            worker.address in wishes.avoided,
            *_decode_load(worker, num_tokens, ledger),
        ),
    )


def usable(workers: Collection[Worker], role: Role, model_digest: str, without: Collection[str] = ()) -> list[Worker]:
    """Ready workers of a role and model, except those at addresses `without`."""
    return [
        worker
        for worker in workers
        if worker.role is role and worker.ready and worker.model_digest == model_digest and worker.address not in without
    ]


def _prefill_seconds(worker: Worker, num_tokens: int, fastest: float, ledger: PlacementLedger) -> float:
    """Until the prompt would be done. A worker without a measured speed counts as the fastest."""
    waiting = worker.queued_tokens + ledger.num_tokens(worker.address)
    return (waiting + num_tokens) / (worker.tokens_per_second or fastest or 1.0)


def _decode_load(worker: Worker, num_tokens: int, ledger: PlacementLedger) -> tuple[bool, int, int, str]:
    """Those without room last, then by requests, then by free blocks."""
    requests = worker.running_requests + worker.queued_requests + ledger.num_requests(worker.address)
    free_blocks = worker.free_blocks - _blocks(worker, ledger.num_tokens(worker.address))
    lacks_room = free_blocks < _blocks(worker, num_tokens + 1)
    return lacks_room or _is_full(worker, ledger), requests, -free_blocks, worker.address


def _is_full(worker: Worker, ledger: PlacementLedger) -> bool:
    requests = worker.running_requests + worker.queued_requests + ledger.num_requests(worker.address)
    return 0 < worker.max_requests <= requests


def _blocks(worker: Worker, num_tokens: int) -> int:
    return 0 if worker.layout is None else math.ceil(num_tokens / worker.layout.block_tokens)


def _no_pair(prefills: Sequence[Worker], decodes: Sequence[Worker]) -> str:
    if any(partners_of(worker, decodes) for worker in prefills):
        return "the hand-off has just broken between all pairs of workers"
    return "no prefill worker's KV layout is the same as a decode worker's"


def _no_worker(workers: Collection[Worker], role: Role, model_digest: str, wishes: Wishes) -> TandemError:
    of_role = [worker for worker in workers if worker.role is role]
    why = _why(of_role, model_digest, wishes)
    return TandemError(Reason.NO_WORKER, f"no {role.value} worker can take the request: {why}", metadata={"role": role.value})


def _why(workers: Sequence[Worker], model_digest: str, wishes: Wishes) -> str:
    if not workers:
        return "none is known"
    counts: Mapping[str, int] = {
        "unreachable": sum(not worker.worker_id for worker in workers),
        "not ready": sum(bool(worker.worker_id) and not worker.ready for worker in workers),
        "of another model": sum(worker.ready and worker.model_digest != model_digest for worker in workers),
        "tried already": sum(worker.ready and worker.address in wishes.without for worker in workers),
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)

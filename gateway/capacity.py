"""What all workers together have room and time for: pure policy over what they last said."""

from collections.abc import Collection
from dataclasses import dataclass

from gateway.routing import PlacementLedger, Role, Worker, usable

# Stands for a bound that a worker does not state.
UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Capacity:
    """Requests, and tokens of prompt and completion together, that the decode workers have room for at once; and the prompt tokens
    that all prefill workers compute a second, 0 as long as nobody knows."""

    num_requests: int
    num_tokens: int
    prefill_tokens_per_s: float = 0.0


def capacity_of(workers: Collection[Worker], model_digest: str) -> Capacity | None:
    """What all usable workers can do together; None while there is no decode worker."""
    decodes = usable(workers, Role.DECODE, model_digest)
    if not decodes:
        return None
    requests = sum(worker.max_requests or UNBOUNDED for worker in decodes)
    return Capacity(requests, sum(worker.pool_tokens for worker in decodes), _prefill_speed(workers, model_digest))


def _prefill_speed(workers: Collection[Worker], model_digest: str) -> float:
    """A worker without a measured speed counts as the fastest."""
    speeds = [worker.tokens_per_second for worker in usable(workers, Role.PREFILL, model_digest)]
    return sum(speed or max(speeds) for speed in speeds)


def largest_decode_pool(workers: Collection[Worker], model_digest: str) -> int | None:
    """Most tokens of prompt and completion together that a usable decode worker can hold; None while there is none."""
    return max((worker.pool_tokens for worker in usable(workers, Role.DECODE, model_digest)), default=None)


# Prompts of a size share a worker with others, and wait for no more than so many times their own tokens of those.
_TOKENS_AHEAD = 4


def seconds_ahead(workers: Collection[Worker], model_digest: str, num_tokens: int, ledger: PlacementLedger) -> float:
    """Until the least busy prefill worker comes to a prompt, its own work not included, much of which may be in the prefix cache.

    0 while a worker has no measured speed.
    """
    found = usable(workers, Role.PREFILL, model_digest)
    if any(worker.tokens_per_second <= 0 for worker in found):
        return 0.0
    return min((_waiting_tokens(worker, num_tokens, ledger) / worker.tokens_per_second for worker in found), default=0.0)


def _waiting_tokens(worker: Worker, num_tokens: int, ledger: PlacementLedger) -> int:
    return min(worker.queued_tokens + ledger.num_tokens(worker.address), _TOKENS_AHEAD * num_tokens)

"""What a worker says of itself: WorkerStatusService."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc.aio

from tandem.api.v1 import operations_pb2
from tandem.interceptor import CallCounts
from tandem.server import Server
from tandem.tracing import recent_spans
from tandem.worker.v1 import kv_pb2, status_pb2, status_pb2_grpc

SERVICE_NAME: str = status_pb2.DESCRIPTOR.services_by_name["WorkerStatusService"].full_name


@dataclass(frozen=True)
class WorkerIdentity:
    """What never changes while a worker lives. `worker_id` is a UUID made at process start; `transports` are best first."""

    worker_id: str
    role: operations_pb2.WorkerRole
    model_digest: str
    tokenizer_digest: str
    layout: kv_pb2.KvLayout
    device: str
    weight_format: str
    transports: tuple[str, ...]
    weight_format_reason: str = ""


@dataclass(frozen=True)
class WorkerSnapshot:
    """A worker's state at one moment. `queued_tokens` are still to compute, for waiting and running requests."""

    role: operations_pb2.WorkerRole
    condition: operations_pb2.WorkerCondition
    queued_requests: int
    queued_tokens: int
    running_requests: int
    max_requests: int
    total_blocks: int
    free_blocks: int
    tokens_per_second: float
    requests: CallCounts = field(default_factory=CallCounts)
    handoff: operations_pb2.HandoffCounts | None = None


def condition(server: Server) -> operations_pb2.WorkerCondition:
    """Of a worker that has started to serve; its server is not ready for one of two reasons."""
    if server.stopping:
        return operations_pb2.WORKER_CONDITION_DRAINING
    return operations_pb2.WORKER_CONDITION_SERVING if server.ready else operations_pb2.WORKER_CONDITION_STALLED


class StatusServicer(status_pb2_grpc.WorkerStatusServiceServicer):
    """Streams snapshots to whoever watches. `snapshot` is called on the event loop and must not block."""

    def __init__(
        self,
        identity: WorkerIdentity,
        snapshot: Callable[[], WorkerSnapshot],
        *,
        minimum_interval_s: float = 0.05,
        maximum_interval_s: float = 0.5,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._identity = identity
        self._snapshot = snapshot
        self._minimum_interval_s = minimum_interval_s
        self._maximum_interval_s = maximum_interval_s
        self._sleep = sleep
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = object()
        """Another one after each change."""
        self._changed = asyncio.Event()
        self._num_waiting = 0
        self._wake_is_due = False
        self._sequence_number = 0

    def changed(self) -> None:
        """Says that the state has changed; from any thread, and cheap enough for every step of an engine."""
        self._state = object()
        # Who begins to wait just now looks at the state after it is counted. Other lost races only cost a second wake-up: the flag
        # is cleared on the loop before the state is read.
        if self._num_waiting == 0 or self._wake_is_due:
            return
        loop = self._loop
        if loop is not None and not loop.is_closed():
            self._wake_is_due = True
            loop.call_soon_threadsafe(self._wake)

    async def Watch(
        self, request: status_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[status_pb2.WatchResponse]:
        """One state at once, then after changes, at most every `minimum_interval_s` and at least every `maximum_interval_s`."""
        self._loop = asyncio.get_running_loop()
        while True:
            told = self._state
            yield self._response()
            await self._sleep(self._minimum_interval_s)
            await self._until_changed(told, self._maximum_interval_s - self._minimum_interval_s)

    async def GetSpans(self, request: status_pb2.GetSpansRequest, context: grpc.aio.ServicerContext) -> status_pb2.GetSpansResponse:
        """The remembered spans of a trace; INVALID_ARGUMENT unless its id is 32 lower-case hexadecimal digits."""
        return status_pb2.GetSpansResponse(spans=recent_spans(request.trace_id))

    async def _until_changed(self, told: object, timeout_s: float) -> None:
        changed = self._changed
        self._num_waiting += 1
        try:
            if self._state is told:
                async with asyncio.timeout(timeout_s):
                    await changed.wait()
        except TimeoutError:
            return
        finally:
            self._num_waiting -= 1

    def _wake(self) -> None:
        self._wake_is_due = False
        self._changed.set()
        self._changed = asyncio.Event()

    def _response(self) -> status_pb2.WatchResponse:
        self._sequence_number += 1
        identity, snapshot = self._identity, self._snapshot()
        return status_pb2.WatchResponse(
            sequence_number=self._sequence_number,
            worker_id=identity.worker_id,
            role=identity.role,
            ready=snapshot.condition == operations_pb2.WORKER_CONDITION_SERVING,
            model_digest=identity.model_digest,
            tokenizer_digest=identity.tokenizer_digest,
            layout=identity.layout,
            device=identity.device,
            weight_format=identity.weight_format,
            weight_format_reason=identity.weight_format_reason,
            total_blocks=snapshot.total_blocks,
            free_blocks=snapshot.free_blocks,
            queued_requests=snapshot.queued_requests,
            queued_tokens=snapshot.queued_tokens,
            running_requests=snapshot.running_requests,
            max_requests=snapshot.max_requests,
            tokens_per_second=snapshot.tokens_per_second,
            transports=identity.transports,
            condition=snapshot.condition,
            requests=operations_pb2.RequestCounts(**vars(snapshot.requests)),
            handoff=snapshot.handoff,
        )

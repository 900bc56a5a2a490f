"""OperationsService: the gateway's live view, and the spans of a trace from every process."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import grpc
import grpc.aio

from gateway.admission import Admission
from gateway.routing import Condition, RequestCounts, Role, Worker
from gateway.workers import WorkerDirectory
from tandem.api.v1 import operations_pb2, operations_pb2_grpc
from tandem.errors import Reason, TandemError
from tandem.tracing import recent_spans
from tandem.worker.v1 import status_pb2, status_pb2_grpc

logger = logging.getLogger(__name__)

SPANS_TIMEOUT_S = 1.0

_ROLES = {Role.PREFILL: operations_pb2.WORKER_ROLE_PREFILL, Role.DECODE: operations_pb2.WORKER_ROLE_DECODE}
_CONDITIONS = {
    Condition.UNKNOWN: operations_pb2.WORKER_CONDITION_UNSPECIFIED,
    Condition.SERVING: operations_pb2.WORKER_CONDITION_SERVING,
    Condition.DRAINING: operations_pb2.WORKER_CONDITION_DRAINING,
    Condition.STALLED: operations_pb2.WORKER_CONDITION_STALLED,
}


@dataclass(frozen=True)
class GatewayCounts:
    """Since the gateway started; see GetSuiteResponse."""

    requests: RequestCounts
    num_retries: int
    num_migrations: int
    num_quarantined: int
    num_ejections: int


class OperationsServicer(operations_pb2_grpc.OperationsServiceServicer):
    """Answers operators' tools."""

    def __init__(self, admission: Admission, directory: WorkerDirectory, counts: Callable[[], GatewayCounts]) -> None:
        self._admission = admission
        self._counts = counts
        self._directory = directory

    async def GetSuite(
        self, request: operations_pb2.GetSuiteRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.GetSuiteResponse:
        counts = self._counts()
        return operations_pb2.GetSuiteResponse(
            running_requests=self._admission.num_running,
            queued_requests=self._admission.num_queued,
            workers=[_summary(worker, self._directory.handoff(worker.address)) for worker in self._directory.workers],
            requests=operations_pb2.RequestCounts(**asdict(counts.requests)),
            failover=operations_pb2.FailoverCounts(
                retries=counts.num_retries,
                migrations=counts.num_migrations,
                quarantined=counts.num_quarantined,
                ejections=counts.num_ejections,
            ),
        )

    async def GetTrace(
        self, request: operations_pb2.GetTraceRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.GetTraceResponse:
        trace_id = request.trace_id
        own = recent_spans(trace_id)
        reachable = [worker for worker in self._directory.workers if worker.worker_id]
        found = await asyncio.gather(*(self._spans_of(worker, trace_id) for worker in reachable))
        spans = [*own, *itertools.chain.from_iterable(found)]
        if not spans:
            raise TandemError(Reason.TRACE_NOT_FOUND, f"no process remembers trace {trace_id}", metadata={"trace_id": trace_id})
        in_order = sorted(spans, key=_start_ns)
        return operations_pb2.GetTraceResponse(spans=in_order)

    async def _spans_of(self, worker: Worker, trace_id: str) -> Sequence[operations_pb2.Span]:
        try:
            stub = status_pb2_grpc.WorkerStatusServiceStub(self._directory.channel(worker.address))  # type: ignore[no-untyped-call]
            response = await stub.GetSpans(status_pb2.GetSpansRequest(trace_id=trace_id), timeout=SPANS_TIMEOUT_S)
        except (grpc.aio.AioRpcError, KeyError) as error:
            logger.warning("no spans from %s: %s", worker.address, error)
            return ()
        return list(response.spans)


def _start_ns(span: operations_pb2.Span) -> int:
    return int(span.start_time.ToNanoseconds())


def _summary(worker: Worker, handoff: operations_pb2.HandoffCounts | None) -> operations_pb2.WorkerSummary:
    return operations_pb2.WorkerSummary(
        address=worker.address,
        worker_id=worker.worker_id,
        role=_ROLES[worker.role],
        ready=worker.ready,
        device=worker.device,
        weight_format=worker.weight_format,
        weight_format_reason=worker.weight_format_reason,
        total_blocks=worker.total_blocks,
        free_blocks=worker.free_blocks,
        queued_requests=worker.queued_requests,
        queued_tokens=worker.queued_tokens,
        running_requests=worker.running_requests,
        tokens_per_second=worker.tokens_per_second,
        transports=worker.transports,
        condition=_CONDITIONS[worker.condition],
        requests=operations_pb2.RequestCounts(**asdict(worker.requests)),
        handoff=handoff,
    )

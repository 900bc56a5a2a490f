import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from tandem.api.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerCondition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_CONDITION_UNSPECIFIED: _ClassVar[WorkerCondition]
    WORKER_CONDITION_SERVING: _ClassVar[WorkerCondition]
    WORKER_CONDITION_DRAINING: _ClassVar[WorkerCondition]
    WORKER_CONDITION_STALLED: _ClassVar[WorkerCondition]

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
WORKER_CONDITION_UNSPECIFIED: WorkerCondition
WORKER_CONDITION_SERVING: WorkerCondition
WORKER_CONDITION_DRAINING: WorkerCondition
WORKER_CONDITION_STALLED: WorkerCondition
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole

class GetSuiteRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSuiteResponse(_message.Message):
    __slots__ = ("running_requests", "queued_requests", "workers", "requests", "failover")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILOVER_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    queued_requests: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerSummary]
    requests: RequestCounts
    failover: FailoverCounts
    def __init__(self, running_requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerSummary, _Mapping]]] = ..., requests: _Optional[_Union[RequestCounts, _Mapping]] = ..., failover: _Optional[_Union[FailoverCounts, _Mapping]] = ...) -> None: ...

class FailoverCounts(_message.Message):
    __slots__ = ("retries", "migrations", "quarantined", "ejections")
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    EJECTIONS_FIELD_NUMBER: _ClassVar[int]
    retries: int
    migrations: int
    quarantined: int
    ejections: int
    def __init__(self, retries: _Optional[int] = ..., migrations: _Optional[int] = ..., quarantined: _Optional[int] = ..., ejections: _Optional[int] = ...) -> None: ...

class WorkerSummary(_message.Message):
    __slots__ = ("address", "worker_id", "role", "ready", "device", "weight_format", "total_blocks", "free_blocks", "queued_requests", "queued_tokens", "running_requests", "tokens_per_second", "transports", "condition", "requests", "handoff", "weight_format_reason")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_REASON_FIELD_NUMBER: _ClassVar[int]
    address: str
    worker_id: str
    role: WorkerRole
    ready: bool
    device: str
    weight_format: str
    total_blocks: int
    free_blocks: int
    queued_requests: int
    queued_tokens: int
    running_requests: int
    tokens_per_second: float
    transports: _containers.RepeatedScalarFieldContainer[str]
    condition: WorkerCondition
    requests: RequestCounts
    handoff: HandoffCounts
    weight_format_reason: str
    def __init__(self, address: _Optional[str] = ..., worker_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., ready: _Optional[bool] = ..., device: _Optional[str] = ..., weight_format: _Optional[str] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running_requests: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., transports: _Optional[_Iterable[str]] = ..., condition: _Optional[_Union[WorkerCondition, str]] = ..., requests: _Optional[_Union[RequestCounts, _Mapping]] = ..., handoff: _Optional[_Union[HandoffCounts, _Mapping]] = ..., weight_format_reason: _Optional[str] = ...) -> None: ...

class RequestCounts(_message.Message):
    __slots__ = ("received", "ok", "cancelled", "rejected", "failed")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    received: int
    ok: int
    cancelled: int
    rejected: int
    failed: int
    def __init__(self, received: _Optional[int] = ..., ok: _Optional[int] = ..., cancelled: _Optional[int] = ..., rejected: _Optional[int] = ..., failed: _Optional[int] = ...) -> None: ...

class HandoffCounts(_message.Message):
    __slots__ = ("tickets", "pulls")
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    tickets: TicketCounts
    pulls: _containers.RepeatedCompositeFieldContainer[PullCounts]
    def __init__(self, tickets: _Optional[_Union[TicketCounts, _Mapping]] = ..., pulls: _Optional[_Iterable[_Union[PullCounts, _Mapping]]] = ...) -> None: ...

class TicketCounts(_message.Message):
    __slots__ = ("granted", "released", "expired", "aborted", "stale", "silenced", "refused_connections")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    SILENCED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    granted: int
    released: int
    expired: int
    aborted: int
    stale: int
    silenced: int
    refused_connections: int
    def __init__(self, granted: _Optional[int] = ..., released: _Optional[int] = ..., expired: _Optional[int] = ..., aborted: _Optional[int] = ..., stale: _Optional[int] = ..., silenced: _Optional[int] = ..., refused_connections: _Optional[int] = ...) -> None: ...

class PullCounts(_message.Message):
    __slots__ = ("worker_id", "transport", "pulled", "pulled_blocks", "refetched", "checksum_failures", "stale", "damaged", "resumed", "interrupted")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    PULLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REFETCHED_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FAILURES_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    INTERRUPTED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: _generation_pb2.Transport
    pulled: int
    pulled_blocks: int
    refetched: int
    checksum_failures: int
    stale: int
    damaged: int
    resumed: int
    interrupted: int
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[_Union[_generation_pb2.Transport, str]] = ..., pulled: _Optional[int] = ..., pulled_blocks: _Optional[int] = ..., refetched: _Optional[int] = ..., checksum_failures: _Optional[int] = ..., stale: _Optional[int] = ..., damaged: _Optional[int] = ..., resumed: _Optional[int] = ..., interrupted: _Optional[int] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("trace_id",)
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    trace_id: str
    def __init__(self, trace_id: _Optional[str] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("span_id", "parent_span_id", "name", "service", "start_time", "end_time", "attributes")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    parent_span_id: str
    name: str
    service: str
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    attributes: _containers.RepeatedCompositeFieldContainer[SpanAttribute]
    def __init__(self, span_id: _Optional[str] = ..., parent_span_id: _Optional[str] = ..., name: _Optional[str] = ..., service: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attributes: _Optional[_Iterable[_Union[SpanAttribute, _Mapping]]] = ...) -> None: ...

class SpanAttribute(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

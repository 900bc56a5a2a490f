from tandem.api.v1 import operations_pb2 as _operations_pb2
from tandem.worker.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("sequence_number", "worker_id", "role", "ready", "model_digest", "tokenizer_digest", "layout", "device", "weight_format", "total_blocks", "free_blocks", "queued_requests", "queued_tokens", "running_requests", "max_requests", "tokens_per_second", "transports", "condition", "requests", "handoff", "weight_format_reason")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_REASON_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    worker_id: str
    role: _operations_pb2.WorkerRole
    ready: bool
    model_digest: str
    tokenizer_digest: str
    layout: _kv_pb2.KvLayout
    device: str
    weight_format: str
    total_blocks: int
    free_blocks: int
    queued_requests: int
    queued_tokens: int
    running_requests: int
    max_requests: int
    tokens_per_second: float
    transports: _containers.RepeatedScalarFieldContainer[str]
    condition: _operations_pb2.WorkerCondition
    requests: _operations_pb2.RequestCounts
    handoff: _operations_pb2.HandoffCounts
    weight_format_reason: str
    def __init__(self, sequence_number: _Optional[int] = ..., worker_id: _Optional[str] = ..., role: _Optional[_Union[_operations_pb2.WorkerRole, str]] = ..., ready: _Optional[bool] = ..., model_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., layout: _Optional[_Union[_kv_pb2.KvLayout, _Mapping]] = ..., device: _Optional[str] = ..., weight_format: _Optional[str] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running_requests: _Optional[int] = ..., max_requests: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., transports: _Optional[_Iterable[str]] = ..., condition: _Optional[_Union[_operations_pb2.WorkerCondition, str]] = ..., requests: _Optional[_Union[_operations_pb2.RequestCounts, _Mapping]] = ..., handoff: _Optional[_Union[_operations_pb2.HandoffCounts, _Mapping]] = ..., weight_format_reason: _Optional[str] = ...) -> None: ...

class GetSpansRequest(_message.Message):
    __slots__ = ("trace_id",)
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    trace_id: str
    def __init__(self, trace_id: _Optional[str] = ...) -> None: ...

class GetSpansResponse(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[_operations_pb2.Span]
    def __init__(self, spans: _Optional[_Iterable[_Union[_operations_pb2.Span, _Mapping]]] = ...) -> None: ...

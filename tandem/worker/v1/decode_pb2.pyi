from tandem.api.v1 import generation_pb2 as _generation_pb2
from tandem.worker.v1 import kv_pb2 as _kv_pb2
from tandem.worker.v1 import prefill_pb2 as _prefill_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "ticket", "token_ids", "num_prompt_tokens", "sampling", "stop_rule", "logprobs", "follower_id", "stream_number")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_RULE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FOLLOWER_ID_FIELD_NUMBER: _ClassVar[int]
    STREAM_NUMBER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    ticket: _kv_pb2.KvTicket
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _generation_pb2.SamplingParams
    stop_rule: _prefill_pb2.StopRule
    logprobs: int
    follower_id: str
    stream_number: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[_kv_pb2.KvTicket, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stop_rule: _Optional[_Union[_prefill_pb2.StopRule, _Mapping]] = ..., logprobs: _Optional[int] = ..., follower_id: _Optional[str] = ..., stream_number: _Optional[int] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("follower_id", "plain_tokens")
    FOLLOWER_ID_FIELD_NUMBER: _ClassVar[int]
    PLAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    follower_id: str
    plain_tokens: bool
    def __init__(self, follower_id: _Optional[str] = ..., plain_tokens: _Optional[bool] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("deltas", "plain_tokens")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    PLAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[StreamDelta]
    plain_tokens: PlainTokens
    def __init__(self, deltas: _Optional[_Iterable[_Union[StreamDelta, _Mapping]]] = ..., plain_tokens: _Optional[_Union[PlainTokens, _Mapping]] = ...) -> None: ...

class PlainTokens(_message.Message):
    __slots__ = ("stream_numbers", "indexes", "token_ids")
    STREAM_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_numbers: _containers.RepeatedScalarFieldContainer[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_numbers: _Optional[_Iterable[int]] = ..., indexes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamDelta(_message.Message):
    __slots__ = ("stream_number", "delta")
    STREAM_NUMBER_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    stream_number: int
    delta: TokenDelta
    def __init__(self, stream_number: _Optional[int] = ..., delta: _Optional[_Union[TokenDelta, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("reserved", "kv_ready", "delta", "finished")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    KV_READY_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    reserved: Reserved
    kv_ready: KvReady
    delta: TokenDelta
    finished: DecodeFinished
    def __init__(self, reserved: _Optional[_Union[Reserved, _Mapping]] = ..., kv_ready: _Optional[_Union[KvReady, _Mapping]] = ..., delta: _Optional[_Union[TokenDelta, _Mapping]] = ..., finished: _Optional[_Union[DecodeFinished, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvReady(_message.Message):
    __slots__ = ("transport", "pulled_bytes", "pull_us", "refetched_blocks")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_US_FIELD_NUMBER: _ClassVar[int]
    REFETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    transport: _generation_pb2.Transport
    pulled_bytes: int
    pull_us: int
    refetched_blocks: int
    def __init__(self, transport: _Optional[_Union[_generation_pb2.Transport, str]] = ..., pulled_bytes: _Optional[int] = ..., pull_us: _Optional[int] = ..., refetched_blocks: _Optional[int] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("index", "tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_prefill_pb2.SampledToken]
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_prefill_pb2.SampledToken, _Mapping]]] = ...) -> None: ...

class DecodeFinished(_message.Message):
    __slots__ = ("reason", "queue_us", "run_us", "num_preemptions", "num_tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    RUN_US_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: _generation_pb2.FinishReason
    queue_us: int
    run_us: int
    num_preemptions: int
    num_tokens: int
    def __init__(self, reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., queue_us: _Optional[int] = ..., run_us: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

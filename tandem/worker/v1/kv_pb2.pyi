from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_DTYPE_UNSPECIFIED: _ClassVar[KvDtype]
    KV_DTYPE_FLOAT32: _ClassVar[KvDtype]
    KV_DTYPE_BFLOAT16: _ClassVar[KvDtype]
    KV_DTYPE_FLOAT16: _ClassVar[KvDtype]
    KV_DTYPE_INT8: _ClassVar[KvDtype]

class ChecksumAlgorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_ALGORITHM_UNSPECIFIED: _ClassVar[ChecksumAlgorithm]
    CHECKSUM_ALGORITHM_XXH3_64: _ClassVar[ChecksumAlgorithm]
KV_DTYPE_UNSPECIFIED: KvDtype
KV_DTYPE_FLOAT32: KvDtype
KV_DTYPE_BFLOAT16: KvDtype
KV_DTYPE_FLOAT16: KvDtype
KV_DTYPE_INT8: KvDtype
CHECKSUM_ALGORITHM_UNSPECIFIED: ChecksumAlgorithm
CHECKSUM_ALGORITHM_XXH3_64: ChecksumAlgorithm

class KvTicket(_message.Message):
    __slots__ = ("ticket_id", "epoch", "producer_id", "model_digest", "tokenizer_digest", "layout", "num_tokens", "block_ids", "lease_ms", "checksum_algorithm", "offers", "address", "heartbeat", "fence", "kv_port")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    KV_PORT_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    epoch: int
    producer_id: str
    model_digest: str
    tokenizer_digest: str
    layout: KvLayout
    num_tokens: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    lease_ms: int
    checksum_algorithm: ChecksumAlgorithm
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    address: str
    heartbeat: HeartbeatPort
    fence: BlockFence
    kv_port: KvPort
    def __init__(self, ticket_id: _Optional[str] = ..., epoch: _Optional[int] = ..., producer_id: _Optional[str] = ..., model_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., num_tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., lease_ms: _Optional[int] = ..., checksum_algorithm: _Optional[_Union[ChecksumAlgorithm, str]] = ..., offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., address: _Optional[str] = ..., heartbeat: _Optional[_Union[HeartbeatPort, _Mapping]] = ..., fence: _Optional[_Union[BlockFence, _Mapping]] = ..., kv_port: _Optional[_Union[KvPort, _Mapping]] = ...) -> None: ...

class KvPort(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class BlockFence(_message.Message):
    __slots__ = ("pid", "fd", "inode", "boot_id", "table_bytes", "generations")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    inode: int
    boot_id: str
    table_bytes: int
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., inode: _Optional[int] = ..., boot_id: _Optional[str] = ..., table_bytes: _Optional[int] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class HeartbeatPort(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "dtype", "tensor_parallel_size", "tensor_parallel_rank")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: KvDtype
    tensor_parallel_size: int
    tensor_parallel_rank: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[_Union[KvDtype, str]] = ..., tensor_parallel_size: _Optional[int] = ..., tensor_parallel_rank: _Optional[int] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("shm", "tcp", "cuda_ipc", "nccl")
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    NCCL_FIELD_NUMBER: _ClassVar[int]
    shm: ShmOffer
    tcp: TcpOffer
    cuda_ipc: CudaIpcOffer
    nccl: NcclOffer
    def __init__(self, shm: _Optional[_Union[ShmOffer, _Mapping]] = ..., tcp: _Optional[_Union[TcpOffer, _Mapping]] = ..., cuda_ipc: _Optional[_Union[CudaIpcOffer, _Mapping]] = ..., nccl: _Optional[_Union[NcclOffer, _Mapping]] = ...) -> None: ...

class ShmOffer(_message.Message):
    __slots__ = ("pid", "fd", "inode", "boot_id", "pool_bytes")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    inode: int
    boot_id: str
    pool_bytes: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., inode: _Optional[int] = ..., boot_id: _Optional[str] = ..., pool_bytes: _Optional[int] = ...) -> None: ...

class TcpOffer(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class CudaIpcOffer(_message.Message):
    __slots__ = ("handle", "device_uuid", "pool_bytes", "pid", "process_start_ticks", "boot_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_START_TICKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    device_uuid: str
    pool_bytes: int
    pid: int
    process_start_ticks: int
    boot_id: str
    def __init__(self, handle: _Optional[bytes] = ..., device_uuid: _Optional[str] = ..., pool_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., process_start_ticks: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class NcclOffer(_message.Message):
    __slots__ = ("device_uuid", "nccl_version")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    NCCL_VERSION_FIELD_NUMBER: _ClassVar[int]
    device_uuid: str
    nccl_version: int
    def __init__(self, device_uuid: _Optional[str] = ..., nccl_version: _Optional[int] = ...) -> None: ...

class JoinLinkRequest(_message.Message):
    __slots__ = ("link_id", "unique_id")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_ID_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    unique_id: bytes
    def __init__(self, link_id: _Optional[str] = ..., unique_id: _Optional[bytes] = ...) -> None: ...

class JoinLinkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendBlocksRequest(_message.Message):
    __slots__ = ("link_id", "ticket_id", "epoch", "first_block_index", "num_blocks")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    ticket_id: str
    epoch: int
    first_block_index: int
    num_blocks: int
    def __init__(self, link_id: _Optional[str] = ..., ticket_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_block_index: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class SendBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("ticket_id", "epoch")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    epoch: int
    def __init__(self, ticket_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

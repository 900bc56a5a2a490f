"""Tickets and layouts as protobuf messages, and back."""

from collections.abc import Sequence

from kvtransfer.counters import ProducerCounters, PullCounters
from kvtransfer.packets import MAX_TEXT_BYTES
from kvtransfer.ticket import (
    TRANSPORTS,
    BlockFence,
    CudaIpcOffer,
    HeartbeatPort,
    KvPort,
    KvTicket,
    NcclOffer,
    ShmOffer,
    TcpOffer,
    TransportOffer,
)
from llm.kv.exported_memory import ExportedMemory
from llm.kv.layout import KvDtype, KvLayout
from llm.kv.memory_file import MemoryFile
from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason, TandemError, invalid_field
from tandem.worker.v1 import kv_pb2

_DTYPES: dict[KvDtype, kv_pb2.KvDtype] = {
    "float32": kv_pb2.KV_DTYPE_FLOAT32,
    "bfloat16": kv_pb2.KV_DTYPE_BFLOAT16,
    "float16": kv_pb2.KV_DTYPE_FLOAT16,
    "int8": kv_pb2.KV_DTYPE_INT8,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}

TRANSPORT_NUMBERS = {name: generation_pb2.Transport.Value(f"TRANSPORT_{name.upper()}") for name in TRANSPORTS}


def tickets_to_proto(counters: ProducerCounters) -> operations_pb2.HandoffCounts:
    """What a prefill worker says of its hand-offs."""
    return operations_pb2.HandoffCounts(tickets=operations_pb2.TicketCounts(**vars(counters)))


def pulls_to_proto(rows: Sequence[PullCounters]) -> operations_pb2.HandoffCounts:
    """What a decode worker says of its hand-offs."""
    return operations_pb2.HandoffCounts(pulls=[_pull_to_proto(row) for row in rows])


def _pull_to_proto(row: PullCounters) -> operations_pb2.PullCounts:
    counts = dict(vars(row))
    producer_id, transport = counts.pop("producer_id"), TRANSPORT_NUMBERS[counts.pop("transport")]
    return operations_pb2.PullCounts(worker_id=producer_id, transport=transport, **counts)


def layout_to_proto(layout: KvLayout) -> kv_pb2.KvLayout:
    return kv_pb2.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=_DTYPES[layout.dtype],
        tensor_parallel_size=layout.tensor_parallel_size,
        tensor_parallel_rank=layout.tensor_parallel_rank,
    )


def layout_from_proto(message: kv_pb2.KvLayout) -> KvLayout:
    """Raises KV_LAYOUT_MISMATCH for a type of element that this version does not know."""
    dtype = _DTYPE_NAMES.get(message.dtype)
    if dtype is None:
        raise TandemError(Reason.KV_LAYOUT_MISMATCH, f"KV elements of type {message.dtype} are not known here")
    return KvLayout(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
        dtype=dtype,
        tensor_parallel_size=message.tensor_parallel_size,
        tensor_parallel_rank=message.tensor_parallel_rank,
    )


def ticket_to_proto(ticket: KvTicket) -> kv_pb2.KvTicket:
    heartbeat, fence, port = ticket.heartbeat, ticket.fence, ticket.kv_port
    return kv_pb2.KvTicket(
        ticket_id=ticket.ticket_id,
        epoch=ticket.epoch,
        producer_id=ticket.producer_id,
        model_digest=ticket.model_digest,
        tokenizer_digest=ticket.tokenizer_digest,
        layout=layout_to_proto(ticket.layout),
        num_tokens=ticket.num_tokens,
        block_ids=ticket.block_ids,
        lease_ms=ticket.lease_ms,
        checksum_algorithm=kv_pb2.CHECKSUM_ALGORITHM_XXH3_64,
        offers=[_offer_to_proto(offer) for offer in ticket.offers],
        address=ticket.address,
        heartbeat=None if heartbeat is None else kv_pb2.HeartbeatPort(host=heartbeat.host, port=heartbeat.port),
        fence=None if fence is None else _fence_to_proto(fence),
        kv_port=None if port is None else kv_pb2.KvPort(host=port.host, port=port.port),
    )


def ticket_from_proto(message: kv_pb2.KvTicket) -> KvTicket:
    """Raises INVALID_REQUEST for a ticket that lacks a part, KV_LAYOUT_MISMATCH for a layout or checksum not known here."""
    for name in ("ticket_id", "producer_id", "address", "num_tokens"):
        if not getattr(message, name):
            raise invalid_field(f"ticket.{name}", "must be set")
    if len(message.ticket_id.encode()) > MAX_TEXT_BYTES:
        raise invalid_field("ticket.ticket_id", f"has more than {MAX_TEXT_BYTES} bytes")
    if message.checksum_algorithm != kv_pb2.CHECKSUM_ALGORITHM_XXH3_64:
        raise TandemError(Reason.KV_LAYOUT_MISMATCH, f"checksum algorithm {message.checksum_algorithm} is not known here")
    offers = (_offer_from_proto(offer) for offer in message.offers)
    return KvTicket(
        ticket_id=message.ticket_id,
        epoch=message.epoch,
        producer_id=message.producer_id,
        model_digest=message.model_digest,
        tokenizer_digest=message.tokenizer_digest,
        layout=layout_from_proto(message.layout),
        num_tokens=message.num_tokens,
        block_ids=tuple(message.block_ids),
        lease_ms=message.lease_ms,
        offers=tuple(offer for offer in offers if offer is not None),
        address=message.address,
        heartbeat=HeartbeatPort(message.heartbeat.host, message.heartbeat.port) if message.HasField("heartbeat") else None,
        fence=_fence_from_proto(message.fence, len(message.block_ids)) if message.HasField("fence") else None,
        kv_port=KvPort(message.kv_port.host, message.kv_port.port) if message.HasField("kv_port") else None,
    )


def _fence_to_proto(fence: BlockFence) -> kv_pb2.BlockFence:
    file = fence.file
    return kv_pb2.BlockFence(
        pid=file.pid,
        fd=file.fd,
        inode=file.inode,
        boot_id=file.boot_id,
        table_bytes=file.num_bytes,
        generations=fence.generations,
    )


def _fence_from_proto(message: kv_pb2.BlockFence, num_blocks: int) -> BlockFence:
    if len(message.generations) != num_blocks:
        raise invalid_field("ticket.fence.generations", "must be one for each block")
    file = MemoryFile(message.pid, message.fd, message.inode, message.boot_id, message.table_bytes)
    return BlockFence(file, tuple(message.generations))


def _offer_to_proto(offer: TransportOffer) -> kv_pb2.TransportOffer:
    match offer:
        case CudaIpcOffer(memory):
            return kv_pb2.TransportOffer(cuda_ipc=_cuda_ipc_to_proto(memory))
        case NcclOffer(device_uuid, nccl_version):
            return kv_pb2.TransportOffer(nccl=kv_pb2.NcclOffer(device_uuid=device_uuid, nccl_version=nccl_version))
        case ShmOffer(pid, fd, inode, boot_id, pool_bytes):
            shm = kv_pb2.ShmOffer(pid=pid, fd=fd, inode=inode, boot_id=boot_id, pool_bytes=pool_bytes)
            return kv_pb2.TransportOffer(shm=shm)
        case TcpOffer(host, port):
            return kv_pb2.TransportOffer(tcp=kv_pb2.TcpOffer(host=host, port=port))


def _offer_from_proto(message: kv_pb2.TransportOffer) -> TransportOffer | None:
    """None for a transport that this version does not know."""
    match message.WhichOneof("transport"):
        case "shm":
            shm = message.shm
            return ShmOffer(shm.pid, shm.fd, shm.inode, shm.boot_id, shm.pool_bytes)
        case "cuda_ipc":
            return CudaIpcOffer(_cuda_ipc_from_proto(message.cuda_ipc))
        case "nccl":
            return NcclOffer(message.nccl.device_uuid, message.nccl.nccl_version)
        case "tcp":
            return TcpOffer(message.tcp.host, message.tcp.port)
        case _:
            return None


def _cuda_ipc_to_proto(memory: ExportedMemory) -> kv_pb2.CudaIpcOffer:
    return kv_pb2.CudaIpcOffer(
        handle=memory.handle,
        device_uuid=memory.device_uuid,
        pool_bytes=memory.num_bytes,
        pid=memory.pid,
        process_start_ticks=memory.process_start_ticks,
        boot_id=memory.boot_id,
    )


def _cuda_ipc_from_proto(offer: kv_pb2.CudaIpcOffer) -> ExportedMemory:
    return ExportedMemory(offer.handle, offer.device_uuid, offer.pool_bytes, offer.pid, offer.process_start_ticks, offer.boot_id)

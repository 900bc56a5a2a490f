"""What passes from a prefill worker to a decode worker: the right to pull one request's KV blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm.kv.exported_memory import ExportedMemory
from llm.kv.layout import KvLayout
from llm.kv.memory_file import MemoryFile

TRANSPORTS = ("cuda_ipc", "shm", "nccl", "tcp")
"""All that there are, best first."""

ChecksumAlgorithm = Literal["xxh3_64"]


@dataclass(frozen=True)
class ShmOffer:
    """The producer's pool can be mapped by processes of the same kernel. `inode` tells a reused pid or fd from the real one."""

    pid: int
    fd: int
    inode: int
    boot_id: str
    pool_bytes: int

    @property
    def file(self) -> MemoryFile:
        return MemoryFile(self.pid, self.fd, self.inode, self.boot_id, self.pool_bytes)


@dataclass(frozen=True)
class TcpOffer:
    """The producer sends blocks to whoever connects here and names a ticket."""

    host: str
    port: int


@dataclass(frozen=True)
class CudaIpcOffer:
    """The producer's pool lies in GPU memory that processes of the same host can open."""

    memory: ExportedMemory


@dataclass(frozen=True)
class HeartbeatPort:
    """Where the producer answers heartbeats. They alone keep a lease alive."""

    host: str
    port: int


@dataclass(frozen=True)
class KvPort:
    """Where the producer tells of a ticket's blocks, whatever transport fetches them."""

    host: str
    port: int


@dataclass(frozen=True)
class BlockFence:
    """The producer's table of block generations, and what the ticket's blocks have there while they are its own."""

    file: MemoryFile
    generations: tuple[int, ...]


@dataclass(frozen=True)
class NcclOffer:
    """The producer's GPU can be joined by NCCL of that version, unless it is the consumer's own."""

    device_uuid: str
    nccl_version: int


TransportOffer = CudaIpcOffer | ShmOffer | NcclOffer | TcpOffer


@dataclass(frozen=True)
class KvTicket:
    """Entitles its bearer to pull blocks while the lease lasts. layout.blocks_for(num_tokens) == len(block_ids).

    `producer_id` is a UUID made at process start; `address` is where the producer's KvTransferService listens. `epoch` is the
    attempt at the request that the blocks belong to.
    """

    ticket_id: str
    epoch: int
    producer_id: str
    model_digest: str
    tokenizer_digest: str
    layout: KvLayout
    num_tokens: int
    block_ids: tuple[int, ...]
    lease_ms: int
    offers: tuple[TransportOffer, ...]
    address: str
    heartbeat: HeartbeatPort | None = None
    """None: the lease is not renewed."""
    fence: BlockFence | None = None
    """None: the blocks may not be read from the producer's memory."""
    kv_port: KvPort | None = None
    """None: a producer of an earlier version, which tells of its blocks in another way."""
    checksum_algorithm: ChecksumAlgorithm = "xxh3_64"


def check_names(transports: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for an unknown transport, or none at all."""
    unknown = [name for name in transports if name not in TRANSPORTS]
    if unknown or not transports:
        raise ValueError(f"transports are {', '.join(TRANSPORTS)}; got {', '.join(transports) or 'none'}")
    return tuple(transports)

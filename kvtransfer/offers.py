"""What a producer says of each transport, so that consumers can use it."""

from kvtransfer.ticket import CudaIpcOffer, KvPort, NcclOffer, ShmOffer, TcpOffer, TransportOffer
from kvtransfer.transports.nccl_link import nccl_version
from llm.kv.pool import KvPool


def offer_for(name: str, pool: KvPool, port: KvPort) -> TransportOffer:
    """For a transport by which the pool's blocks can go."""
    shared, exported = pool.shared, pool.exported
    if name == "cuda_ipc" and exported is not None:
        return CudaIpcOffer(exported)
    if name == "nccl" and exported is not None:
        return NcclOffer(exported.device_uuid, nccl_version())
    if name == "shm" and shared is not None:
        return ShmOffer(shared.pid, shared.fd, shared.inode, shared.boot_id, shared.num_bytes)
    return TcpOffer(port.host, port.port)

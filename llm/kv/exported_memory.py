"""The name of GPU memory for other processes of its host."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedMemory:
    """How another process of this host finds the memory. The start tells a reused pid from the real one."""

    handle: bytes
    device_uuid: str
    num_bytes: int
    pid: int
    process_start_ticks: int
    boot_id: str

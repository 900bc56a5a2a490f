"""The few CUDA calls that sharing memory between processes takes, by cupy: its only place, imported only where there is a GPU.

torch's own allocations cannot be shared: a handle leads to the base of what cudaMalloc returned, and torch hands out parts of that.
Devices are this process's numbers; a pointer is that of the device's memory as this process sees it.
"""

from __future__ import annotations

import cupy
import torch
from cupy.cuda import runtime
from torch.utils.dlpack import from_dlpack

CudaError = runtime.CUDARuntimeError


def allocate(num_bytes: int, device: int) -> int:
    """A new allocation of its own. Raises CudaError if the device has no such room."""
    with cupy.cuda.Device(device):
        return int(runtime.malloc(num_bytes))


def free(pointer: int, device: int) -> None:
    """Waits for all work of the device that this process began."""
    with cupy.cuda.Device(device):
        runtime.deviceSynchronize()
        runtime.free(pointer)


def handle_of(pointer: int, device: int) -> bytes:
    """64 bytes by which another process of this host opens the allocation."""
    with cupy.cuda.Device(device):
        return bytes(runtime.ipcGetMemHandle(pointer))


def open_handle(handle: bytes, device: int) -> int:
    """Another process's allocation, wherever it lies, for kernels of `device`. Raises CudaError."""
    with cupy.cuda.Device(device):
        return int(runtime.ipcOpenMemHandle(handle))


def close_handle(pointer: int, device: int) -> None:
    """Waits for all work of the device that this process began."""
    with cupy.cuda.Device(device):
        runtime.deviceSynchronize()
        runtime.ipcCloseMemHandle(pointer)


def tensor_at(pointer: int, num_bytes: int, device: int) -> torch.Tensor:
    """The memory as a tensor of bytes for kernels of `device`, not copied; to be dropped before the memory is given back."""
    memory = cupy.cuda.UnownedMemory(pointer, num_bytes, None, device)
    array = cupy.ndarray((num_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    with cupy.cuda.Device(device):
        return from_dlpack(array)


def device_uuids() -> list[str]:
    """The visible GPUs' UUIDs by number, in hex."""
    return [bytes(runtime.getDeviceProperties(number)["uuid"]).hex() for number in range(runtime.getDeviceCount())]


def reaches(device: int, other: int) -> bool:
    """Whether kernels of `device` can read the memory of `other`."""
    return device == other or bool(runtime.deviceCanAccessPeer(device, other))

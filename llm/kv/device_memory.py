"""Memory of a GPU that other processes of the host can open, and such memory of theirs."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from llm.kv.exported_memory import ExportedMemory
from llm.kv.host_identity import boot_id, process_start_ticks


class DeviceMemoryError(Exception):
    """The memory cannot be had, or not be opened from here; the message says why, for people."""


class DeviceMemory:
    """An allocation of its own on one GPU, zeroed. The caller frees it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Raises DeviceMemoryError if the GPU has no such room, or cupy is missing."""
        self._calls = _cuda_calls()
        self._device = device.index or 0
        try:
            self._pointer = self._calls.allocate(num_bytes, self._device)
        except self._calls.CudaError as error:
            raise DeviceMemoryError(f"{num_bytes / 2**30:.1f} GiB cannot be had on {device} ({error})") from error
        self.tensor = self._calls.tensor_at(self._pointer, num_bytes, self._device).zero_()
        """The bytes."""
        handle = self._calls.handle_of(self._pointer, self._device)
        uuid = self._calls.device_uuids()[self._device]
        self.exported = ExportedMemory(handle, uuid, num_bytes, os.getpid(), process_start_ticks(os.getpid()), boot_id())

    def free(self) -> None:
        """Waits for the GPU; no tensor of the memory may be used any more. Idempotent."""
        if self._pointer:
            self.tensor = torch.empty(0)
            self._calls.free(self._pointer, self._device)
            self._pointer = 0


class ImportedMemory:
    """Another process's memory, for kernels of one GPU of ours. The caller closes it."""

    def __init__(self, exported: ExportedMemory, device: torch.device) -> None:
        """Raises DeviceMemoryError."""
        self._calls = _cuda_calls()
        self._device = device.index or 0
        self.exported = exported
        self.on_same_device = self._find(exported)
        self._visible = self._producer_is_there()
        try:
            self._pointer = self._calls.open_handle(exported.handle, self._device)
        except self._calls.CudaError as error:
            raise DeviceMemoryError(f"producer's GPU memory cannot be opened ({error})") from error
        self.tensor = self._calls.tensor_at(self._pointer, exported.num_bytes, self._device)
        """The bytes; they are the other process's to write."""

    @property
    def producer_is_gone(self) -> bool:
        """Whether the process is known to have ended; a process of another container is not seen from here."""
        return self._visible and not self._producer_is_there()

    def close(self) -> None:
        """Waits for the GPU; no tensor of the memory may be used any more. Idempotent."""
        if self._pointer:
            self.tensor = torch.empty(0)
            self._calls.close_handle(self._pointer, self._device)
            self._pointer = 0

    def _producer_is_there(self) -> bool:
        return process_start_ticks(self.exported.pid) == self.exported.process_start_ticks

    def _find(self, exported: ExportedMemory) -> bool:
        """Whether the memory is on our own device, after making sure that it can be reached at all."""
        if not exported.boot_id or exported.boot_id != boot_id():
            raise DeviceMemoryError("producer runs on another host (boot id differs)")
        if (exported.pid, exported.process_start_ticks) == (os.getpid(), process_start_ticks(os.getpid())):
            raise DeviceMemoryError("producer is this very process")
        uuids = self._calls.device_uuids()
        if exported.device_uuid not in uuids:
            raise DeviceMemoryError("producer's GPU is not visible from here (another container, or CUDA_VISIBLE_DEVICES)")
        other = uuids.index(exported.device_uuid)
        if not self._calls.reaches(self._device, other):
            raise DeviceMemoryError("the two GPUs cannot read each other's memory")
        return bool(other == self._device)


def _cuda_calls() -> ModuleType:
    try:
        from llm.kv import cuda_calls
    except ImportError as error:
        raise DeviceMemoryError("KV in GPU memory needs cupy: install tandem-serve[cuda]") from error
    return cuda_calls

"""The few NCCL calls of the nccl transport, by cupy: its only place, imported only where there is a GPU."""

from __future__ import annotations

import os
import struct

import cupy
from cupy.cuda import nccl

# Two ranks gain nothing from multicast, and machines whose switch cannot do it fail when it is tried.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

NcclError = nccl.NcclError

_UNIQUE_ID = struct.Struct("128b")


def version() -> int:
    """As NCCL numbers it."""
    return int(nccl.get_version())


def unique_id() -> bytes:
    """A new communicator's name, 128 bytes; this process then listens for the other."""
    return _UNIQUE_ID.pack(*nccl.get_unique_id())


class Communicator:
    """This process and one other; sends and receives are started on a stream, given by its handle."""

    def __init__(self, unique_id: bytes, rank: int, device: int) -> None:
        """Returns when both have come. Raises NcclError."""
        self._peer = 1 - rank
        self._device = device
        with cupy.cuda.Device(device):
            self._communicator = nccl.NcclCommunicator(2, _UNIQUE_ID.unpack(unique_id), rank)

    def send(self, pointer: int, num_bytes: int, stream: int) -> None:
        with cupy.cuda.Device(self._device):
            self._communicator.send(pointer, num_bytes, nccl.NCCL_UINT8, self._peer, stream)

    def receive(self, pointer: int, num_bytes: int, stream: int) -> None:
        with cupy.cuda.Device(self._device):
            self._communicator.recv(pointer, num_bytes, nccl.NCCL_UINT8, self._peer, stream)

    def abort(self) -> None:
        """Ends it, and what of it is under way; whoever is in another call of it gets an error."""
        self._communicator.abort()

"""The few NCCL calls of the nccl transport, by cupy: its only place, imported only where there is a GPU."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import cupy
from cupy.cuda import nccl

# Two ranks gain nothing from multicast, and machines whose switch cannot do it fail when it is tried.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

NcclError = nccl.NcclError

_SIGNED = struct.Struct("128b")


def version() -> int:
    """As NCCL numbers it."""
    return int(nccl.get_version())


def unique_id() -> bytes:
    """A new communicator's name, 128 bytes; this process then listens for the other."""
    return bytes(value % 256 for value in nccl.get_unique_id())


class Communicator:
    """This process and one other; sends and receives are started on a stream, given by its handle."""

    def __init__(self, unique_id: bytes, rank: int, device: int) -> None:
        """Returns when both have come. Raises NcclError."""
        self._peer = 1 - rank
        self._device = device
        with cupy.cuda.Device(device):
            self._communicator = _join(unique_id, rank)

    def send(self, pointer: int, num_bytes: int, stream: int) -> None:
        with cupy.cuda.Device(self._device):
            self._communicator.send(pointer, num_bytes, nccl.NCCL_UINT8, self._peer, stream)

    def receive(self, pointer: int, num_bytes: int, stream: int) -> None:
        with cupy.cuda.Device(self._device):
            self._communicator.recv(pointer, num_bytes, nccl.NCCL_UINT8, self._peer, stream)

    def abort(self) -> None:
        """Ends it, and what of it is under way; whoever is in another call of it gets an error."""
        self._communicator.abort()


def _join(unique_id: bytes, rank: int) -> Any:
    """Releases of cupy differ in how they take a name; what one does not take it refuses before it calls NCCL."""
    forms: tuple[Sequence[int], ...] = (tuple(unique_id), unique_id, _SIGNED.unpack(unique_id))
    for form in forms[:-1]:
        with suppress(TypeError, OverflowError):
            return nccl.NcclCommunicator(2, form, rank)
    return nccl.NcclCommunicator(2, forms[-1], rank)

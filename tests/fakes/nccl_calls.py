"""What kvtransfer.transports.nccl_calls does, between two threads of one process."""

from __future__ import annotations

import ctypes
import queue
import secrets
import threading
from dataclasses import dataclass, field

import pytest

from kvtransfer.transports import nccl_link


class NcclError(Exception):
    """As cupy's."""


@dataclass
class FakeNccl:
    """`cut`: every message from now on fails at both ends."""

    cut: bool = False
    wires: dict[bytes, tuple[queue.Queue[bytes], queue.Queue[bytes], threading.Barrier]] = field(default_factory=dict)
    communicators: list[Communicator] = field(default_factory=list)

    NcclError = NcclError

    def version(self) -> int:
        return 22809

    def unique_id(self) -> bytes:
        name = secrets.token_bytes(128)
        self.wires[name] = (queue.Queue(), queue.Queue(), threading.Barrier(2))
        return name

    def Communicator(self, unique_id: bytes, rank: int, device: int) -> Communicator:
        *wires, both = self.wires[unique_id]
        both.wait(30)
        communicator = Communicator(self, wires[rank], wires[1 - rank])
        self.communicators.append(communicator)
        return communicator


class Communicator:
    """One end: bytes go into one queue and come from the other."""

    def __init__(self, nccl: FakeNccl, outgoing: queue.Queue[bytes], incoming: queue.Queue[bytes]) -> None:
        self._nccl = nccl
        self._outgoing = outgoing
        self._incoming = incoming
        self.aborted = False

    def send(self, pointer: int, num_bytes: int, stream: int) -> None:
        self._check()
        self._outgoing.put(ctypes.string_at(pointer, num_bytes))

    def receive(self, pointer: int, num_bytes: int, stream: int) -> None:
        self._check()
        message = self._incoming.get(timeout=30)
        assert len(message) == num_bytes, "the two sides are out of step"
        ctypes.memmove(pointer, message, num_bytes)

    def abort(self) -> None:
        self.aborted = True

    def _check(self) -> None:
        if self._nccl.cut or self.aborted:
            raise NcclError("unhandled system error")


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    """Puts it in place of the real one."""
    nccl = FakeNccl()
    monkeypatch.setattr(nccl_link, "nccl_calls", lambda: nccl)
    return nccl

"""One NCCL communicator between a producer and a consumer, and the GPU memory through which blocks pass."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks

MAX_LINKS = 4
"""Of one process. A link takes 50 to 100 MB of GPU memory for NCCL and ROOM_BYTES of ours; whoever comes later takes another
transport."""

ROOM_BYTES = 32 << 20
"""What a link sends at once: enough for full speed."""

SEND_S = 2.0
JOIN_S = 4.0
"""Less than a lease lasts: the ticket for whose sake the link is made must not be over by then."""
_POLL_S = 20e-6


class LinkError(Exception):
    """The link is lost, or could not be made; the message says why, for people."""


class Link:
    """For one thread at a time. Whatever fails ends it for good, and `lost` then is true; the owner aborts it in the end."""

    def __init__(self, unique_id: bytes, rank: int, blocks: DeviceBlocks) -> None:
        """Waits for the other side, up to a moment. Raises LinkError."""
        self.lost = False
        self.max_blocks = max(1, min(blocks.num_per_job, ROOM_BYTES // blocks.block_bytes))
        self._block_bytes = blocks.block_bytes
        on_gpu = blocks.device.type == "cuda"
        self._stream = torch.cuda.Stream(blocks.device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self.row = blocks.row(self.max_blocks)
        """What is sent, or was received; the first blocks of it."""
        self._communicator = _join(unique_id, rank, blocks.device.index or 0)
        self._aborted = threading.Lock()

    def send(self, num_blocks: int) -> None:
        """Sends the row's first blocks. Raises LinkError."""
        self._run(self._communicator.send, num_blocks)

    def receive(self, num_blocks: int) -> None:
        """Fills the row's first blocks. Raises LinkError."""
        self._run(self._communicator.receive, num_blocks)

    def abort(self) -> None:
        """Ends the link at once, whoever uses it. Idempotent; from any thread."""
        if self._aborted.acquire(blocking=False):
            self.lost = True
            self._communicator.abort()

    def _run(self, start: Callable[[int, int, int], None], num_blocks: int) -> None:
        stream = self._stream
        try:
            start(self.row.data_ptr(), num_blocks * self._block_bytes, 0 if stream is None else stream.cuda_stream)
            self._wait()
        except (LinkError, nccl_calls().NcclError) as error:
            self.abort()
            raise LinkError(f"NCCL link lost: {error}") from error

    def _wait(self) -> None:
        """Not by synchronizing: the other side may never come."""
        deadline = time.monotonic() + SEND_S
        while self._stream is not None and not self._stream.query():
            if time.monotonic() > deadline:
                raise LinkError(f"no end within {SEND_S:g} s")
            time.sleep(_POLL_S)


def nccl_calls() -> ModuleType:
    """Raises LinkError where there is no NCCL."""
    try:
        from kvtransfer.transports import nccl_calls

        nccl_calls.version()
    except (ImportError, AttributeError) as error:
        raise LinkError("NCCL is not installed (tandem-serve[cuda], nvidia-nccl-cu13)") from error
    return nccl_calls


def new_unique_id() -> bytes:
    """Names a new communicator; this process then listens for the other. Raises LinkError where there is no NCCL."""
    unique_id: bytes = nccl_calls().unique_id()
    return unique_id


def nccl_version() -> int:
    """Raises LinkError where there is no NCCL."""
    return int(nccl_calls().version())


def _join(unique_id: bytes, rank: int, device: int) -> Any:
    """NCCL waits for the other side for as long as it takes; so does a thread of its own, which is left behind after a while."""
    calls = nccl_calls()
    joined: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def join() -> None:
        try:
            joined.put(calls.Communicator(unique_id, rank, device))
        except calls.NcclError as error:
            joined.put(LinkError(f"NCCL cannot join the two GPUs ({error})"))

    threading.Thread(target=join, name="nccl-join", daemon=True).start()
    try:
        communicator = joined.get(timeout=JOIN_S)
    except queue.Empty:
        raise LinkError(f"the other side did not join within {JOIN_S:g} s") from None
    if isinstance(communicator, LinkError):
        raise communicator
    return communicator

"""Copies and checksums of a GPU pool's blocks, beside whatever the engine computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from llm.gpu import quiet_calls
from llm.kv.block_arrays import BlockIds, Sums
from llm.ops.gpu.block_copy import copy_blocks
from llm.ops.gpu.checksum import checksum_room, copy_and_sum_stretches, finish_checksums, sum_stretches

MAX_BLOCKS = 128
"""Blocks of one call; a lane has a sixteenth of a block of GPU memory for each."""

NUM_BEGUN = 4
"""Fetches of one lane that may be under way at once."""

_HIGH_PRIORITY = -1
"""Transfers are short and somebody waits for them; a step's kernels fill the GPU for milliseconds."""


class _Room:
    """Pinned memory of one call: the ids on their way to the GPU, and the sums on their way back."""

    def __init__(self, on_gpu: bool) -> None:
        """On the stream of the lane."""
        self.ids = torch.zeros(2, MAX_BLOCKS, dtype=torch.int32, pin_memory=on_gpu)
        self.ids_here = self.ids.numpy()
        self.sums = torch.empty(MAX_BLOCKS, dtype=torch.int64, pin_memory=on_gpu)
        self.sums_here = self.sums.numpy().view(np.uint64)
        self.event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self.event is not None:
            self.event.record()  # which makes it


class Fetch:
    """A fetch that was begun; see `Copying`. `give_back` takes its room."""

    def __init__(self, room: _Room, count: int, give_back: Callable[[_Room], None]) -> None:
        self.event = room.event
        self._room, self._count, self._give_back = room, count, give_back

    def done(self) -> bool:
        """Without letting other threads have the interpreter."""
        return self.event is None or quiet_calls.passed(self.event)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def sums(self) -> Sums:
        found = self._room.sums_here[: self._count].copy()
        self._give_back(self._room)
        return found


class Lane:
    """A stream of its own over one pool [num_blocks, ...], and pinned room for what goes to and fro. For the thread that makes it.

    Each call but `begin_fetch` returns when the GPU has done with it, however it ends; so nothing reads or writes blocks after a
    call. What the engine's stream does is neither waited for nor held up. On CPU tensors (in tests) the same runs at once.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        on_gpu = pool.is_cuda
        if on_gpu:
            torch.cuda.set_device(pool.device)  # else each call would change the thread's device and change it back
        self._pool, self._words = pool, pool.view(torch.int64)
        self._stream = torch.cuda.Stream(pool.device, priority=_HIGH_PRIORITY) if on_gpu else None  # type: ignore[no-untyped-call]
        self._device_ids = torch.empty(2, MAX_BLOCKS, dtype=torch.int32, device=pool.device)
        # Taken once: in a GPU whose memory is given out, a new allocation in the middle of the work can hold all of it up.
        self._stretches = checksum_room(pool, MAX_BLOCKS)
        with self._running():
            self._own, *self._free = (_Room(on_gpu) for _ in range(1 + NUM_BEGUN))
            # By torch, which binds the thread to the device's context; the driver's own calls only look for one.
            self._device_ids.copy_(self._own.ids, non_blocking=True)

    @property
    def num_free(self) -> int:
        """Fetches that can be begun now."""
        return len(self._free)

    def warm_up(self) -> None:
        """Compiles the kernels."""
        with self._running():
            ids = self._upload(self._own, np.zeros(1, np.int32), np.zeros(1, np.int32))
            beside = torch.empty_like(self._pool[:1])
            copy_blocks(self._pool, beside, ids[0], None)
            for source_ids in (ids[0], None):
                copy_and_sum_stretches(self._pool, beside, source_ids, ids[1], self._stretches)
            self._start_checksums(ids[1])

    def checksums(self, block_ids: BlockIds) -> Sums:
        """XXH3-64 of each block."""
        with self._running():
            self._start_checksums(self._upload(self._own, block_ids)[0])
        return self._checksums(len(block_ids))

    def fetch(self, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        """Copies blocks of `source`, a pool that this GPU can read; the checksums of what came, as it was stored."""
        with self._running():
            self._start_fetch(self._own, source, source_ids, block_ids)
        return self._checksums(len(block_ids))

    def begin_fetch(self, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> Fetch:
        """The same, but returns once it is launched; the lane must have one free."""
        room = self._free.pop()
        with self._on_stream():
            try:
                self._start_fetch(room, source, source_ids, block_ids)
                if room.event is not None:
                    quiet_calls.record(room.event)
            except BaseException:
                self._settle()  # nobody will wait for what was launched
                self._free.append(room)
                raise
        return Fetch(room, len(block_ids), self._free.append)

    def store(self, staged: torch.Tensor, block_ids: BlockIds) -> Sums:
        """Copies rows of bytes from pinned host memory, one a block; the checksums of what then lies in ours."""
        with self._running():
            for row, block in zip(staged, block_ids.tolist(), strict=True):
                self._bytes_of(block).copy_(row, non_blocking=True)
            self._start_checksums(self._upload(self._own, block_ids)[0])
        return self._checksums(len(block_ids))

    def load(self, block_ids: BlockIds, staged: torch.Tensor) -> None:
        """Copies blocks to rows of bytes in pinned host memory."""
        with self._running():
            for row, block in zip(staged, block_ids.tolist(), strict=True):
                row.copy_(self._bytes_of(block), non_blocking=True)

    def gather(self, block_ids: BlockIds, row: torch.Tensor) -> None:
        """Copies blocks into others of the device, [len(block_ids), ...], in one launch."""
        with self._running():
            copy_blocks(self._pool, row, self._upload(self._own, block_ids)[0], None)

    def scatter(self, row: torch.Tensor, block_ids: BlockIds) -> Sums:
        """The other way; the checksums of what was in the row, as it was stored."""
        with self._running():
            ids = self._upload(self._own, block_ids)[0]
            copy_and_sum_stretches(row, self._words, None, ids, self._stretches)
            finish_checksums(self._words, ids, self._stretches, self._own.sums)
        return self._checksums(len(block_ids))

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._on_stream():
            try:
                yield
            finally:
                self._settle()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _upload(self, room: _Room, *rows: BlockIds) -> torch.Tensor:
        """The ids on the device, a row each; valid for what is launched before the next call."""
        count = len(rows[0])
        for row, ids in zip(room.ids_here, rows, strict=False):
            row[:count] = ids
        if self._stream is None:
            self._device_ids.copy_(room.ids)
        else:
            quiet_calls.to_device(self._device_ids, room.ids, room.ids.numel())
        return self._device_ids[:, :count]

    def _start_fetch(self, room: _Room, source: torch.Tensor, source_ids: BlockIds, block_ids: BlockIds) -> None:
        ids = self._upload(room, source_ids, block_ids)
        copy_and_sum_stretches(source, self._words, ids[0], ids[1], self._stretches)
        finish_checksums(self._words, ids[1], self._stretches, room.sums)

    def _start_checksums(self, ids: torch.Tensor) -> None:
        """The last kernel writes them where they are read: a copy would be one more thing to wait for."""
        sum_stretches(self._words, ids, self._stretches)
        finish_checksums(self._words, ids, self._stretches, self._own.sums)

    def _checksums(self, count: int) -> Sums:
        return self._own.sums_here[:count].copy()

    def _bytes_of(self, block_id: int) -> torch.Tensor:
        return self._pool[block_id].view(-1).view(torch.uint8)

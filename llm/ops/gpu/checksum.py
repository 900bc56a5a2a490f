# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""XXH3 with 64 bits and seed 0 of KV blocks where they lie, so that both ends of a hand-off may check on the host or the device.

A block's 1,024-byte stretches are summed in parallel; what must run in order (a scramble of eight 64-bit lanes after each
stretch) runs in one warp for each block. Blocks that are to be copied are summed in the registers that they pass through: over a
link they are read once, and nothing is read again.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from llm.ops import xxh3
from llm.ops.gpu.compiled import launch

_STRETCHES = 8
"""Of one program of the first kernel."""
_AHEAD = 32


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> torch.Tensor:
    return torch.tensor(xxh3.table(), dtype=torch.int64, device=device)


@triton.jit
def _sum_stretches_kernel(
    data_ptr, target_ptr, ids_ptr, target_ids_ptr, table_ptr, sums_ptr, num_stretches,
    COPIES: tl.constexpr, FROM_IDS: tl.constexpr, LAST_KEYS: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """A stretch is 16 stripes of 4 pairs of words: each word's lane gains low * high of (word ^ key), and the pair's other word.

    Words are numbered in one dimension until they are summed: of more the compiler gives a warp what does not lie side by side.
    """
    index = tl.program_id(0)
    block = index.to(tl.int64)
    if FROM_IDS:
        block = tl.load(ids_ptr + index).to(tl.int64)
    places = tl.program_id(1) * STRETCHES * 128 + tl.arange(0, STRETCHES * 128)
    inside = places < num_stretches * 128
    words = tl.load(data_ptr + block * num_stretches * 128 + places, mask=inside, other=0)
    if COPIES:
        target = tl.load(target_ids_ptr + index).to(tl.int64)
        tl.store(target_ptr + target * num_stretches * 128 + places, words, mask=inside)
    stripes, lanes = places // 8 % 16, places % 8
    closes = places >= num_stretches * 128 - 8
    keyed = words ^ tl.load(table_ptr + tl.where(closes, LAST_KEYS + lanes, stripes + lanes))
    left, right = tl.split(tl.reshape(words, (STRETCHES, 16, 4, 2)))
    left_keyed, right_keyed = tl.split(tl.reshape(keyed, (STRETCHES, 16, 4, 2)))
    left_sums = tl.sum(_folded(left_keyed) + right, axis=1)
    right_sums = tl.sum(_folded(right_keyed) + left, axis=1)
    rows = tl.program_id(1) * STRETCHES + tl.arange(0, STRETCHES)[:, None]
    out = sums_ptr + (index.to(tl.int64) * num_stretches + rows) * 8 + tl.arange(0, 4)[None, :] * 2
    tl.store(out, left_sums, mask=rows < num_stretches)
    tl.store(out + 1, right_sums, mask=rows < num_stretches)


@triton.jit
def _folded(words):
    """Low half times high half."""
    bits = words.to(tl.uint64, bitcast=True)
    return ((bits & 0xFFFFFFFF) * (bits >> 32)).to(tl.int64, bitcast=True)


@triton.jit
def _scrambled(lane, keys, sums):
    lane += tl.load(sums).to(tl.uint64, bitcast=True)
    return (lane ^ (lane >> 47) ^ keys) * 0x9E3779B1


@triton.jit
def _finish_kernel(
    sums_ptr, table_ptr, out_ptr, num_stretches, num_bytes,
    SCRAMBLE_KEYS: tl.constexpr, MERGE_KEYS: tl.constexpr, STARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One scramble has to wait for the one before, but not for memory: `AHEAD` sums are loaded at a time."""
    index = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, 8)
    keys = tl.load(table_ptr + SCRAMBLE_KEYS + lanes).to(tl.uint64, bitcast=True)
    lane = tl.load(table_ptr + STARTS + lanes).to(tl.uint64, bitcast=True)
    sums = sums_ptr + index * num_stretches * 8 + lanes
    num_whole = (num_stretches - 1) // AHEAD * AHEAD
    for first in range(0, num_whole, AHEAD):
        for offset in tl.static_range(AHEAD):
            lane = _scrambled(lane, keys, sums + (first + offset) * 8)
    for stretch in range(num_whole, num_stretches - 1):
        lane = _scrambled(lane, keys, sums + stretch * 8)
    lane += tl.load(sums + (num_stretches - 1) * 8).to(tl.uint64, bitcast=True)
    lane ^= tl.load(table_ptr + MERGE_KEYS + lanes).to(tl.uint64, bitcast=True)
    even, odd = tl.split(tl.reshape(lane, (4, 2)))
    folded = (even * odd) ^ tl.umulhi(even, odd)
    total = tl.sum(folded.to(tl.int64, bitcast=True), axis=0).to(tl.uint64, bitcast=True)
    total += num_bytes.to(tl.uint64) * 0x9E3779B185EBCA87
    total = (total ^ (total >> 37)) * 0x165667919E3779F9
    tl.store(out_ptr + index, (total ^ (total >> 32)).to(tl.int64, bitcast=True))


def checksum_room(pool: torch.Tensor, count: int) -> torch.Tensor:
    """What `block_checksums` needs beside for up to `count` blocks: a sixteenth of their size."""
    return torch.empty(count, pool[0].numel() * pool.element_size() // xxh3.STRETCH_BYTES, 8, dtype=torch.int64, device=pool.device)


def block_checksums(
    pool: torch.Tensor, block_ids: torch.Tensor, room: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """pool [num_blocks, ...] contiguous, block_ids [n] int32 -> [n] int64, the bits of XXH3 over each block's bytes.

    A block is a whole number of 1,024 bytes, which every layout of at least 16 tokens and 64 bytes a head's row is.
    """
    count = block_ids.shape[0]
    room = checksum_room(pool, count) if room is None else room
    out = torch.empty(count, dtype=torch.int64, device=pool.device) if out is None else out
    sum_stretches(pool, block_ids, room)
    finish_checksums(pool, block_ids, room, out)
    return out


def sum_stretches(pool: torch.Tensor, block_ids: torch.Tensor, room: torch.Tensor) -> None:
    """The first part of `block_checksums`, which reads the blocks; what it finds is left in `room`."""
    _launch_sums(pool, pool, block_ids, block_ids, room, copies=False)


def copy_and_sum_stretches(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor | None, target_ids: torch.Tensor, room: torch.Tensor
) -> None:
    """`copy_blocks` and the first part of `block_checksums` in one: what is summed is what was read of `source`."""
    _launch_sums(source, target, source_ids, target_ids, room, copies=True)


def _launch_sums(
    source: torch.Tensor,
    target: torch.Tensor,
    source_ids: torch.Tensor | None,
    ids: torch.Tensor,
    room: torch.Tensor,
    *,
    copies: bool,
) -> None:
    source, target = _words(source), _words(target)
    assert source.shape[1:] == target.shape[1:]
    count, num_stretches, from_ids = ids.shape[0], _stretches(source), source_ids is not None
    if count:
        launch(
            _sum_stretches_kernel, (count, triton.cdiv(num_stretches, _STRETCHES)),
            [source, target, ids if source_ids is None else source_ids, ids, _constants(target.device), room],
            (num_stretches, copies, from_ids, xxh3.LAST_KEYS, _STRETCHES), num_warps=4,
        )  # fmt: skip


def finish_checksums(pool: torch.Tensor, block_ids: torch.Tensor, room: torch.Tensor, out: torch.Tensor) -> None:
    """The second part: out [n or more] from `room`. It takes fifty microseconds, for many blocks as for one. `out` may lie in
    pinned memory of the host."""
    count, num_stretches = block_ids.shape[0], _stretches(pool)
    if count:
        launch(
            _finish_kernel, (count, 1), [room, _constants(pool.device), out],
            (num_stretches, num_stretches * xxh3.STRETCH_BYTES, xxh3.SCRAMBLE_KEYS, xxh3.MERGE_KEYS, xxh3.STARTS, _AHEAD),
            num_warps=1,
        )  # fmt: skip


def _words(pool: torch.Tensor) -> torch.Tensor:
    """A view costs as much as a launch; who calls often makes it once."""
    return pool if pool.dtype is torch.int64 else pool.view(torch.int64)


def _stretches(pool: torch.Tensor) -> int:
    """Of a block."""
    num_bytes = pool.stride(0) * pool.element_size()
    assert num_bytes % xxh3.STRETCH_BYTES == 0, "blocks are whole stretches of 1,024 bytes"
    return num_bytes // xxh3.STRETCH_BYTES

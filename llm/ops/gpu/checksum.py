# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""XXH3 with 64 bits and seed 0 of KV blocks where they lie, so that both ends of a hand-off may check on the host or the device.

A block's 1,024-byte stretches are summed in parallel; what must run in order (a scramble of eight 64-bit lanes after each
stretch) runs in one warp for each block. Source: the XXH3 specification, "long" inputs. Reference: the xxhash package.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl

_STRETCH_BYTES = 1024
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364ea"
    "c5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_PRIME32[2], _PRIME64[0], _PRIME64[1], _PRIME64[2], _PRIME64[3], _PRIME32[1], _PRIME64[4], _PRIME32[0])
_STRETCHES = 8
"""Of one program of the first kernel."""
_AHEAD = 32
_KEYS, _LAST_KEYS, _SCRAMBLE_KEYS, _MERGE_KEYS, _STARTS = 0, 24, 32, 40, 48
"""Where each group of 64-bit constants begins in the table given to the kernels."""


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> torch.Tensor:
    def keys(offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", _SECRET, offset)

    start = struct.unpack("<8q", struct.pack("<8Q", *_START))
    return torch.tensor([*keys(0, 24), *keys(121, 8), *keys(128, 8), *keys(11, 8), *start], dtype=torch.int64, device=device)


@triton.jit
def _sum_stretches_kernel(data_ptr, ids_ptr, table_ptr, sums_ptr, num_stretches, LAST_KEYS: tl.constexpr, STRETCHES: tl.constexpr):
    """A stretch is 16 stripes of 4 pairs of words: each word's lane gains low * high of (word ^ key), and the pair's other word."""
    index = tl.program_id(0)
    block = tl.load(ids_ptr + index).to(tl.int64)
    stretches = (tl.program_id(1) * STRETCHES + tl.arange(0, STRETCHES))[:, None, None, None]
    stripes, lanes = (
        tl.arange(0, 16)[None, :, None, None],
        (tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :])[None, None, :, :],
    )
    words = tl.load(
        data_ptr + (block * num_stretches + stretches) * 128 + stripes * 8 + lanes, mask=stretches < num_stretches, other=0
    )
    closes = (stripes == 15) & (stretches == num_stretches - 1)
    keyed = words ^ tl.load(table_ptr + tl.where(closes, LAST_KEYS + lanes, stripes + lanes))
    left, right = tl.split(words)
    left_sums = tl.sum(_folded(tl.split(keyed)[0]) + right, axis=1)
    right_sums = tl.sum(_folded(tl.split(keyed)[1]) + left, axis=1)
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
    return torch.empty(count, pool[0].numel() * pool.element_size() // _STRETCH_BYTES, 8, dtype=torch.int64, device=pool.device)


def block_checksums(pool: torch.Tensor, block_ids: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """pool [num_blocks, ...] contiguous, block_ids [n] int32 -> [n] int64, the bits of XXH3 over each block's bytes.

    A block is a whole number of 1,024 bytes, which every layout of at least 16 tokens and 64 bytes a head's row is.
    """
    num_bytes = pool[0].numel() * pool.element_size()
    assert num_bytes % _STRETCH_BYTES == 0, "blocks are whole stretches of 1,024 bytes"
    count, num_stretches = block_ids.shape[0], num_bytes // _STRETCH_BYTES
    sums = checksum_room(pool, count) if room is None else room
    out = torch.empty(count, dtype=torch.int64, device=pool.device)
    if count:
        table = _constants(pool.device)
        words = pool.view(pool.shape[0], -1).view(torch.int64)
        _sum_stretches_kernel[(count, triton.cdiv(num_stretches, _STRETCHES))](
            words, block_ids, table, sums, num_stretches, LAST_KEYS=_LAST_KEYS, STRETCHES=_STRETCHES, num_warps=4
        )
        _finish_kernel[(count,)](
            sums, table, out, num_stretches, num_bytes,
            SCRAMBLE_KEYS=_SCRAMBLE_KEYS, MERGE_KEYS=_MERGE_KEYS, STARTS=_STARTS, AHEAD=_AHEAD, num_warps=1,
        )  # fmt: skip
    return out

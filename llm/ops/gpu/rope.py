# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Rotary position embedding and the write of K and V into the paged pool, in one launch. Reference: llm.ops.rope.

q and k are turned in place. Rows whose block is negative (padding of a captured batch) are turned but not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs

_HEADS = 16


@dataclass(frozen=True)
class KvPlaces:
    """Where each row's K and V go, [n] int32 each: the pool's block, and the token's place in it."""

    blocks: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True)
class Angles:
    """cos and sin [p, d/2] float32, and the table row of each token, [n] int32; None if token i has row i."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor | None = None


@triton.jit
def _rotate_and_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, rows_ptr, blocks_ptr, offsets_ptr, pool_ptr, stride, block_stride, kv_stride, head_stride,
    num_query_heads, num_kv_heads, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr, LOOKS_UP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, BLOCK_HALF)
    inside = (heads < num_query_heads + 2 * num_kv_heads) & (columns < HALF)[None, :]
    place = qkv_ptr + row * stride + heads * (2 * HALF) + columns[None, :]
    wait_for_inputs(EARLY)
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    angle = row
    if LOOKS_UP:
        angle = tl.load(rows_ptr + row).to(tl.int64)
    cos = tl.load(cos_ptr + angle * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    turns = heads < num_query_heads + num_kv_heads
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    first = tl.where(turns, (wide_first * cos - wide_second * sin).to(first.dtype), first)
    second = tl.where(turns, (wide_second * cos + wide_first * sin).to(second.dtype), second)
    tl.store(place, first, mask=inside & turns)
    tl.store(place + HALF, second, mask=inside & turns)
    block = tl.load(blocks_ptr + row).to(tl.int64)
    offset = tl.load(offsets_ptr + row)
    is_value = heads >= num_query_heads + num_kv_heads
    kv_head = heads - num_query_heads - tl.where(is_value, num_kv_heads, 0)
    target = pool_ptr + block * block_stride + tl.where(is_value, kv_stride, 0) + kv_head * head_stride
    target += offset * (2 * HALF) + columns[None, :]
    written = inside & (heads >= num_query_heads) & (block >= 0)
    tl.store(target, first.to(pool_ptr.dtype.element_ty), mask=written)
    tl.store(target + HALF, second.to(pool_ptr.dtype.element_ty), mask=written)


def rotate_and_write(qkv: torch.Tensor, angles: Angles, places: KvPlaces, pool: torch.Tensor, layer: int) -> None:
    """qkv [n, (h + 2 kv) d], contiguous rows; pool [blocks, layers, 2, kv, block_tokens, d] of any float type."""
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    num_heads = qkv.shape[1] // head_dim
    view = pool[:, layer]
    heads = min(_HEADS, triton.next_power_of_2(num_heads))
    _rotate_and_write_kernel[(qkv.shape[0], triton.cdiv(num_heads, heads))](
        qkv, angles.cos, angles.sin, places.blocks if angles.rows is None else angles.rows, places.blocks, places.offsets, view,
        qkv.stride(0), view.stride(0), view.stride(1), view.stride(2), num_heads - 2 * num_kv_heads, num_kv_heads,
        HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), HEADS=heads, LOOKS_UP=angles.rows is not None,
        num_warps=4, **dependent_launch(),
    )  # fmt: skip

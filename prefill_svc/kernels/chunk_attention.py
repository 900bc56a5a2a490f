# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Attention of prompts' chunks over paged K and V: softmax(q k^T / sqrt(d)) v, causal, grouped query heads.

Prompts of any lengths lie one after another without padding; each may begin with cached tokens. A program takes one tile of new
tokens of one query head; tiles with the longest contexts start first. Long fresh prompts go to the library instead, see
library_attention. Source: Dao, FlashAttention-2, 2023. Reference: llm.ops.attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.batch import Batch, Integers
from llm.gpu.tiles import Tiles
from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs
from prefill_svc.kernels.library_attention import attend, is_available, whole_tokens


@dataclass(frozen=True)
class Shape:
    """How the work is cut: new tokens of a tile, context tokens at a time, warps, loads in flight."""

    rows: int = 128
    tokens: int = 128
    num_warps: int = 8
    num_stages: int = 2


_SMALL = Shape(64, 64, 4, 3)
"""Where no chunk has more tokens than half a tile: half the warps, and a step that still fits their registers."""


@triton.jit
def _attend(
    query, highest, total, attended, positions, pages_ptr, pool_ptr, begin, end, length, block_stride, kv_stride, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Takes in the context's tokens from `begin` to `end`; those up to each row's own position where MASKED, else all."""
    columns = tl.arange(0, COLUMNS)
    real = columns < HEAD_DIM
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        places = start + tl.arange(0, TOKENS)
        held = places < length
        page = tl.load(pages_ptr + places // PAGE, mask=held, other=0).to(tl.int64)
        base = pool_ptr + page * block_stride + (places % PAGE) * HEAD_DIM
        if MASKED:
            key = tl.load(base[None, :] + columns[:, None], mask=held[None, :] & real[:, None], other=0.0)
            value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=held[:, None] & real[None, :], other=0.0)
        elif HEAD_DIM == COLUMNS:
            key = tl.load(base[None, :] + columns[:, None])
            value = tl.load(base[:, None] + kv_stride + columns[None, :])
        else:
            key = tl.load(base[None, :] + columns[:, None], mask=real[:, None], other=0.0)
            value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=real[None, :], other=0.0)
        scores = tl.dot(query, key.to(query.dtype), input_precision="ieee")
        if MASKED:
            scores = tl.where(held[None, :] & (places[None, :] <= positions[:, None]), scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        weight = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        attended = tl.dot(weight.to(query.dtype), value.to(query.dtype), attended * shrink[:, None], input_precision="ieee")
        highest = higher
    return highest, total, attended


@triton.jit
def _chunk_attention_kernel(
    qkv_ptr, pool_ptr, out_ptr, tile_sequences_ptr, tile_rows_ptr, tile_counts_ptr, tile_positions_ptr, block_starts_ptr,
    block_ids_ptr, qkv_stride, out_stride, block_stride, kv_stride, head_stride, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(EARLY)
    count = tl.load(tile_counts_ptr + tile)
    first_position = tl.load(tile_positions_ptr + tile)
    first_row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    pages_ptr = block_ids_ptr + tl.load(block_starts_ptr + tl.load(tile_sequences_ptr + tile))
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    asked = (rows < count)[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(qkv_ptr + (first_row + rows)[:, None] * qkv_stride + head * HEAD_DIM + columns[None, :], mask=asked, other=0.0)
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    attended = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    pool_ptr += (head // GROUP) * head_stride
    positions, length = first_position + rows, first_position + count
    # All rows see every token before `common`; only the last few steps need a mask.
    common = (first_position + 1) // TOKENS * TOKENS
    highest, total, attended = _attend(
        query, highest, total, attended, positions, pages_ptr, pool_ptr, 0, common, length, block_stride, kv_stride, scale,
        False, HEAD_DIM, COLUMNS, PAGE, TOKENS, STAGES,
    )  # fmt: skip
    highest, total, attended = _attend(
        query, highest, total, attended, positions, pages_ptr, pool_ptr, common, length, length, block_stride, kv_stride, scale,
        True, HEAD_DIM, COLUMNS, PAGE, TOKENS, STAGES,
    )  # fmt: skip
    out = out_ptr + (first_row + rows)[:, None] * out_stride + head * HEAD_DIM + columns[None, :]
    tl.store(out, (attended / total[:, None]).to(out_ptr.dtype.element_ty), mask=asked)


class ChunkAttention:
    """Holds no memory; the shape decides how the tiles that it is given must be cut."""

    def __init__(self, shape: Shape | None = None) -> None:
        self._shape = shape or Shape()
        self.tile_tokens = self._shape.rows
        """New tokens of a sequence that one program takes."""

    def whole_tokens(self, batch: Batch, pool: torch.Tensor) -> Integers | None:
        """What the library takes, where there is one for this pool."""
        return whole_tokens(batch) if is_available(pool.device, pool.dtype, pool.shape[5]) else None

    def __call__(self, qkv: torch.Tensor, tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv [n, (h + 2 kv) d], q and k already turned, K and V of the new tokens already in the pool -> [n, h d]."""
        num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
        if tiles.whole == (slice(0, qkv.shape[0]),):
            return attend(qkv, num_kv_heads, head_dim)
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        out = torch.empty(qkv.shape[0], num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
        if tiles.num_tiles:
            self._attend_tiles(qkv, tiles, pool, layer, out)
        for rows in tiles.whole:
            out[rows] = attend(qkv[rows], num_kv_heads, head_dim)
        return out

    def _attend_tiles(self, qkv: torch.Tensor, tiles: Tiles, pool: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        num_kv_heads, page, head_dim = pool.shape[3], pool.shape[4], pool.shape[5]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        view, rows = pool[:, layer], max(16, min(self._shape.rows, triton.next_power_of_2(tiles.max_count)))
        shape = self._shape if rows == self._shape.rows else _SMALL
        _chunk_attention_kernel[(num_heads, tiles.num_tiles)](
            qkv, view, out, tiles.sequences, tiles.rows, tiles.counts, tiles.positions, tiles.block_starts, tiles.block_ids,
            qkv.stride(0), out.stride(0), view.stride(0), view.stride(1), view.stride(2), math.log2(math.e) / math.sqrt(head_dim),
            GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, COLUMNS=triton.next_power_of_2(head_dim), PAGE=page, ROWS=rows,
            TOKENS=shape.tokens, STAGES=shape.num_stages, num_warps=shape.num_warps,
            **dependent_launch(),
        )  # fmt: skip

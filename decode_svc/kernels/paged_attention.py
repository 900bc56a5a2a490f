# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Attention of 1 to 16 new tokens a sequence over paged K and V: softmax(q k^T / sqrt(d)) v, causal, grouped query heads.

A program takes all query heads of one KV head, so that K and V are read once, and one stretch of the context. Long contexts are
split into stretches, as many as keep the chip busy; the last program to finish a sequence adds the stretches up, in the same
launch. Lengths may differ within a batch. With one new token each, as in decode steps, the same launch also turns q and k, and
writes K and V. Source: Dao et al., Flash-Decoding, 2023. Reference: llm.ops.attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from decode_svc.kernels.stretches import add_stretch, read_stretch, store_results
from llm.batch import Batch, Integers
from llm.gpu.tiles import Tiles
from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs
from llm.ops.gpu.rope import Angles

_PROGRAMS = 528
"""Programs that fill a chip of 132 multiprocessors four times over."""
_REDUCED_VALUES = 8192
"""Partial results that the adding program holds at a time: 64 registers a thread."""


@dataclass(frozen=True)
class Stretch:
    """What a program takes at a time: context tokens, warps, loads in flight."""

    tokens: int = 64
    num_warps: int = 2
    num_stages: int = 3
    least_tokens: int = 0
    """The fewest tokens of a split; 0: by the number of programs."""


@triton.jit
def _paged_attention_kernel(
    qkv_ptr, pool_ptr, out_ptr, partial_ptr, weights_ptr, counters_ptr,
    tile_sequences_ptr, tile_rows_ptr, tile_counts_ptr, tile_positions_ptr, block_starts_ptr, block_ids_ptr,
    qkv_stride, out_stride, block_stride, kv_stride, head_stride, scale, least_tokens,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(tile_counts_ptr + tile)
    first_position = tl.load(tile_positions_ptr + tile)
    length = first_position + count
    active = tl.minimum(SPLITS, tl.cdiv(length, least_tokens))
    span = tl.cdiv(tl.cdiv(length, tl.maximum(active, 1)), TOKENS) * TOKENS
    active = tl.cdiv(length, tl.maximum(span, 1))
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tokens, heads = rows // GROUP, head * GROUP + rows % GROUP
    asked, real = tokens < count, columns < HEAD_DIM
    first_row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    pages_ptr = block_ids_ptr + tl.load(block_starts_ptr + tl.load(tile_sequences_ptr + tile))
    wait_for_inputs(EARLY)
    if (count == 0) | (split >= active):
        if (count == 0) & (split == 0):
            padding = out_ptr + first_row * out_stride + heads[:, None] * HEAD_DIM + columns[None, :]
            tl.store(padding, tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty), mask=(rows < GROUP)[:, None] & real[None, :])
        return
    query = tl.load(
        qkv_ptr + (first_row + tokens)[:, None] * qkv_stride + heads[:, None] * HEAD_DIM + columns[None, :],
        mask=asked[:, None] & real[None, :],
        other=0.0,
    )
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    attended = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    pool_ptr += head * head_stride
    begin = split * span
    end = tl.minimum(begin + span, length)
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        places = start + tl.arange(0, TOKENS)
        held = places < end
        key, value = read_stretch(pool_ptr, pages_ptr, places, held, block_stride, kv_stride, HEAD_DIM, COLUMNS, PAGE)
        seen = held[None, :] & (places[None, :] <= (first_position + tokens)[:, None])
        highest, total, attended = add_stretch(query, key, value, seen, scale, highest, total, attended)
    store_results(
        out_ptr, partial_ptr, weights_ptr, counters_ptr, highest, total, attended, first_row, count, active, out_stride,
        GROUP, HEAD_DIM, COLUMNS, ROWS, KEPT, SPLITS, CHUNK,
    )  # fmt: skip


@triton.jit
def _turned(place, mask, columns, cos, sin, HEAD_DIM: tl.constexpr):
    """Heads at the pointers `place`, turned, in their own type; the sines are negative in the first half of the columns."""
    HALF: tl.constexpr = HEAD_DIM // 2
    own = tl.load(place + columns, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(place + tl.where(columns < HALF, columns + HALF, columns - HALF), mask=mask, other=0.0).to(tl.float32)
    return (own * cos + other * sin).to(place.dtype.element_ty)


@triton.jit
def _next_token_kernel(
    qkv_ptr, cos_ptr, sin_ptr, pool_ptr, out_ptr, partial_ptr, weights_ptr, counters_ptr,
    tile_sequences_ptr, tile_rows_ptr, tile_counts_ptr, tile_positions_ptr, block_starts_ptr, block_ids_ptr,
    qkv_stride, out_stride, block_stride, kv_stride, head_stride, scale, least_tokens,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """As _paged_attention_kernel for tiles of at most one token; what that finds done, the rotation and the write, is done here.

    K and V of earlier tokens are older than the launch just before: the first of them are on their way while qkv is being computed.
    For that the wait is within the loop, whose loads the compiler moves ahead of it. The last split takes the new token too.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(tile_counts_ptr + tile)
    position = tl.load(tile_positions_ptr + tile)
    active = tl.maximum(1, tl.minimum(SPLITS, tl.cdiv(position, least_tokens)))
    span = tl.maximum(1, tl.cdiv(tl.cdiv(position, active), TOKENS)) * TOKENS
    active = tl.maximum(1, tl.cdiv(position, span))
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    heads = head * GROUP + rows % GROUP
    real = columns < HEAD_DIM
    asked = (rows < GROUP)[:, None] & real[None, :]
    row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    pages_ptr = block_ids_ptr + tl.load(block_starts_ptr + tl.load(tile_sequences_ptr + tile))
    if (count == 0) | (split >= active):
        wait_for_inputs(EARLY)
        if (count == 0) & (split == 0):
            padding = out_ptr + row * out_stride + heads[:, None] * HEAD_DIM + columns[None, :]
            tl.store(padding, tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty), mask=asked)
        return
    angle = position.to(tl.int64) * (HEAD_DIM // 2) + columns % (HEAD_DIM // 2)
    cos = tl.load(cos_ptr + angle, mask=real, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=real, other=0.0)
    sin = tl.where(columns < HEAD_DIM // 2, -sin, sin)
    own_page = tl.load(pages_ptr + position // PAGE).to(tl.int64)
    pool_ptr += head * head_stride
    query = tl.zeros((ROWS, COLUMNS), dtype=qkv_ptr.dtype.element_ty)
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    attended = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, position)
    for start in tl.range(begin, tl.maximum(end, begin + 1), TOKENS, num_stages=STAGES):
        places = start + tl.arange(0, TOKENS)
        held = places < end
        key, value = read_stretch(pool_ptr, pages_ptr, places, held, block_stride, kv_stride, HEAD_DIM, COLUMNS, PAGE)
        if start == begin:
            wait_for_inputs(EARLY)
            line = qkv_ptr + row * qkv_stride
            query = _turned(line + heads[:, None] * HEAD_DIM, asked, columns[None, :], cos[None, :], sin[None, :], HEAD_DIM)
            if split == active - 1:
                place = line + (tl.num_programs(1) * GROUP + head) * HEAD_DIM
                own_key = _turned(place, real, columns, cos, sin, HEAD_DIM).to(pool_ptr.dtype.element_ty)
                own_value = tl.load(place + tl.num_programs(1) * HEAD_DIM + columns, mask=real, other=0.0)
                own_value = own_value.to(pool_ptr.dtype.element_ty)
                target = pool_ptr + own_page * block_stride + (position % PAGE) * HEAD_DIM + columns
                tl.store(target, own_key, mask=real)
                tl.store(target + kv_stride, own_value, mask=real)
                highest = tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], axis=1) * scale
                total = tl.full((ROWS,), 1.0, dtype=tl.float32)
                attended = tl.zeros((ROWS, COLUMNS), dtype=tl.float32) + own_value.to(tl.float32)[None, :]
        highest, total, attended = add_stretch(query, key, value, held[None, :], scale, highest, total, attended)
    store_results(
        out_ptr, partial_ptr, weights_ptr, counters_ptr, highest, total, attended, row, count, active, out_stride,
        GROUP, HEAD_DIM, COLUMNS, ROWS, KEPT, SPLITS, CHUNK,
    )  # fmt: skip


class PagedAttention:
    """Owns the memory in which parts of a sequence meet. One call at a time on one stream."""

    tile_tokens = 16
    """New tokens of a sequence that one program takes."""

    def __init__(self, stretch: Stretch | None = None) -> None:
        self._stretch = stretch or Stretch()
        self._partial = torch.empty(0)
        self._weights = torch.empty(0)
        self._counters = torch.empty(0, dtype=torch.int32)
        self._retired: list[torch.Tensor] = []

    def whole_tokens(self, batch: Batch, pool: torch.Tensor) -> Integers | None:
        """Every new token is in a tile."""
        return None

    def __call__(self, qkv: torch.Tensor, tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv [n, (h + 2 kv) d], q already turned, K and V of the new tokens already in the pool -> [n, h d].

        On a GPU the tiles may not have been written by the launch just before, since they are read while that ends.
        """
        return self._launch(_paged_attention_kernel, (qkv,), tiles, pool, layer)

    def turn_and_attend(self, qkv: torch.Tensor, angles: Angles, tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv [n, (h + 2 kv) d] as the projection left it, which is not changed -> [n, h d].

        Tiles of at most one token, whose K and V are written; angles by position. On a GPU the pool's K and V of earlier tokens may
        not have been written by the launch just before, either.
        """
        assert tiles.max_count <= 1, "more tokens need K and V of each other"
        return self._launch(_next_token_kernel, (qkv, angles.cos, angles.sin), tiles, pool, layer)

    def _launch(self, kernel: Any, inputs: tuple[torch.Tensor, ...], tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """`inputs` are the kernel's first arguments, qkv before all."""
        qkv, (num_kv_heads, page, head_dim) = inputs[0], pool.shape[3:]
        group = qkv.shape[1] // head_dim // num_kv_heads - 2
        out = torch.empty(qkv.shape[0], group * num_kv_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
        splits, least_tokens = choose_splits(tiles.num_tiles * num_kv_heads)
        least_tokens = self._stretch.least_tokens or least_tokens
        kept = triton.next_power_of_2(group * tiles.max_count)
        columns = triton.next_power_of_2(head_dim)
        self._reserve(tiles.num_tiles * num_kv_heads, splits * kept, columns, qkv.device)
        view, stretch = pool[:, layer], self._stretch
        kernel[(tiles.num_tiles, num_kv_heads, splits)](
            *inputs, view, out, self._partial, self._weights, self._counters,
            tiles.sequences, tiles.rows, tiles.counts, tiles.positions, tiles.block_starts, tiles.block_ids,
            qkv.stride(0), out.stride(0), view.stride(0), view.stride(1), view.stride(2),
            math.log2(math.e) / math.sqrt(head_dim), least_tokens,
            GROUP=group, HEAD_DIM=head_dim, COLUMNS=columns, PAGE=page, ROWS=max(16, kept), KEPT=kept, TOKENS=stretch.tokens,
            SPLITS=splits,
            CHUNK=max(1, min(splits, _REDUCED_VALUES // (kept * columns))), STAGES=stretch.num_stages,
            num_warps=stretch.num_warps if kept <= 16 else 4 if kept <= 64 else 8, **dependent_launch(),
        )  # fmt: skip
        return out

    def _reserve(self, pairs: int, rows: int, columns: int, device: torch.device) -> None:
        """Grows the scratch. What it had stays alive, for graphs captured with it go on using it."""
        if self._weights.numel() < pairs * rows or self._partial.numel() < pairs * rows * columns or self._partial.device != device:
            self._retired += [self._weights, self._partial]
            self._weights = torch.empty(pairs * rows, dtype=torch.float32, device=device)
            self._partial = torch.empty(pairs * rows * columns, dtype=torch.float32, device=device)
        if self._counters.numel() < pairs or self._counters.device != device:
            self._retired.append(self._counters)
            self._counters = torch.zeros(pairs, dtype=torch.int32, device=device)


def choose_splits(pairs: int) -> tuple[int, int]:
    """Parts that a context may be split into, a power of two, and the fewest tokens a part has.

    `pairs` of sequence and KV head alone may fill the chip; then only a context much longer than the others' is split.
    """
    splits = 1 << max(3, min(5, (_PROGRAMS // pairs).bit_length()))
    return splits, 64 if pairs * 8 <= _PROGRAMS else 256 if pairs <= _PROGRAMS // 2 else 1024

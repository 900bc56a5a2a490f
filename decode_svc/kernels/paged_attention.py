# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0915, PLR0917
"""Attention of 1 to 16 new tokens a sequence over paged K and V: softmax(q k^T / sqrt(d)) v, causal, grouped query heads.

A program takes all query heads of one KV head, so that K and V are read once, and one stretch of the context. Long contexts are
split into stretches, as many as keep the chip busy; the last program to finish a sequence adds the stretches up, in the same
launch. Lengths may differ within a batch. Source: Dao et al., Flash-Decoding, 2023. Reference: llm.ops.attention.
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
        page = tl.load(pages_ptr + places // PAGE, mask=held, other=0).to(tl.int64)
        base = pool_ptr + page * block_stride + (places % PAGE) * HEAD_DIM
        if HEAD_DIM == COLUMNS:
            key = tl.load(base[None, :] + columns[:, None], mask=held[None, :], other=0.0)
            value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=held[:, None], other=0.0)
        else:
            key = tl.load(base[None, :] + columns[:, None], mask=held[None, :] & real[:, None], other=0.0)
            value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=held[:, None] & real[None, :], other=0.0)
        scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
        seen = held[None, :] & (places[None, :] <= (first_position + tokens)[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # A stretch may lie wholly behind a row's own position: no score of it is finite, and nothing is to be added.
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weight, axis=1)
        attended = attended * shrink[:, None] + tl.dot(weight.to(query.dtype), value.to(query.dtype), input_precision="ieee")
        highest = higher
    out = out_ptr + (first_row + tokens)[:, None] * out_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    if active == 1:
        tl.store(out, (attended / total[:, None]).to(out_ptr.dtype.element_ty), mask=asked[:, None] & real[None, :])
        return
    place = ((tile * tl.num_programs(1) + head) * SPLITS).to(tl.int64)
    mine = partial_ptr + (place + split) * KEPT * COLUMNS + rows[:, None] * COLUMNS + columns[None, :]
    # Nothing of this stretch concerns a row whose total is 0: highest is -inf there, and so is its weight.
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(mine, attended / divisor[:, None], mask=(rows < KEPT)[:, None])
    tl.store(weights_ptr + (place + split) * KEPT + rows, highest + tl.log2(divisor), mask=rows < KEPT)
    # Every thread's part is stored before one of them announces it.
    tl.debug_barrier()
    counter = counters_ptr + tile * tl.num_programs(1) + head
    if tl.atomic_add(counter, 1, sem="acq_rel") != active - 1:
        return
    tl.store(counter, 0)
    splits, kept = tl.arange(0, SPLITS), tl.arange(0, KEPT)
    weights = tl.load(
        weights_ptr + (place + splits)[:, None] * KEPT + kept[None, :],
        mask=(splits < active)[:, None],
        other=-float("inf"),
        cache_modifier=".cg",
    )
    highest_kept = tl.max(weights, axis=0)
    total_kept = tl.sum(tl.exp2(weights - highest_kept[None, :]), axis=0)
    summed = tl.zeros((KEPT, COLUMNS), dtype=tl.float32)
    for start in range(0, active, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        weight = tl.load(
            weights_ptr + (place + chunk)[:, None] * KEPT + kept[None, :],
            mask=(chunk < active)[:, None],
            other=-float("inf"),
            cache_modifier=".cg",
        )
        share = tl.exp2(weight - highest_kept[None, :]) / total_kept[None, :]
        cells = (place + chunk)[:, None, None] * (KEPT * COLUMNS) + kept[None, :, None] * COLUMNS + columns[None, None, :]
        part = tl.load(partial_ptr + cells, mask=(chunk < active)[:, None, None], other=0.0, cache_modifier=".cg")
        summed += tl.sum(part * share[:, :, None], axis=0)
    kept_tokens, kept_heads = kept // GROUP, head * GROUP + kept % GROUP
    out = out_ptr + (first_row + kept_tokens)[:, None] * out_stride + kept_heads[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out, summed.to(out_ptr.dtype.element_ty), mask=(kept_tokens < count)[:, None] & real[None, :])


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
        num_kv_heads, page, head_dim = pool.shape[3], pool.shape[4], pool.shape[5]
        group = qkv.shape[1] // head_dim // num_kv_heads - 2
        out = torch.empty(qkv.shape[0], group * num_kv_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
        splits, least_tokens = choose_splits(tiles.num_tiles * num_kv_heads)
        least_tokens = self._stretch.least_tokens or least_tokens
        kept = triton.next_power_of_2(group * tiles.max_count)
        columns = triton.next_power_of_2(head_dim)
        self._reserve(tiles.num_tiles * num_kv_heads, splits * kept, columns, qkv.device)
        view, stretch = pool[:, layer], self._stretch
        _paged_attention_kernel[(tiles.num_tiles, num_kv_heads, splits)](
            qkv, view, out, self._partial, self._weights, self._counters,
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

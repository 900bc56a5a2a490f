# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""What programs of decode attention do with a stretch of a sequence's context. All of it is inlined where it is called."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_stretch(
    pool_ptr, pages_ptr, places, held, block_stride, kv_stride, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr
):
    """K [columns, tokens] and V [tokens, columns] of the tokens at `places`, zeros where they are not `held`."""
    columns = tl.arange(0, COLUMNS)
    real = columns < HEAD_DIM
    page = tl.load(pages_ptr + places // PAGE, mask=held, other=0).to(tl.int64)
    base = pool_ptr + page * block_stride + (places % PAGE) * HEAD_DIM
    if HEAD_DIM == COLUMNS:
        key = tl.load(base[None, :] + columns[:, None], mask=held[None, :], other=0.0)
        value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=held[:, None], other=0.0)
    else:
        key = tl.load(base[None, :] + columns[:, None], mask=held[None, :] & real[:, None], other=0.0)
        value = tl.load(base[:, None] + kv_stride + columns[None, :], mask=held[:, None] & real[None, :], other=0.0)
    return key, value


@triton.jit
def add_stretch(query, key, value, seen, scale, highest, total, attended):
    """Takes the tokens that are `seen` into each row's highest score, sum of weights, and weighted sum of V."""
    scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    # A stretch may lie wholly behind a row's own position: no score of it is finite, and nothing is to be added.
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(highest - reference)
    total = total * shrink + tl.sum(weight, axis=1)
    attended = attended * shrink[:, None] + tl.dot(weight.to(query.dtype), value.to(query.dtype), input_precision="ieee")
    return higher, total, attended


@triton.jit
def store_results(
    out_ptr, partial_ptr, weights_ptr, counters_ptr, highest, total, attended, first_row, count, active, out_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Stores a tile's results, or this split's part of them; the last of the `active` splits to get here adds all parts up."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    real = columns < HEAD_DIM
    if active == 1:
        tokens, heads = rows // GROUP, head * GROUP + rows % GROUP
        out = out_ptr + (first_row + tokens)[:, None] * out_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        results = (attended / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out, results, mask=(tokens < count)[:, None] & real[None, :])
    else:
        place = ((tile * tl.num_programs(1) + head) * SPLITS).to(tl.int64)
        mine = partial_ptr + (place + split) * KEPT * COLUMNS + rows[:, None] * COLUMNS + columns[None, :]
        # Nothing of this stretch concerns a row whose total is 0: highest is -inf there, and so is its weight.
        divisor = tl.where(total == 0.0, 1.0, total)
        tl.store(mine, attended / divisor[:, None], mask=(rows < KEPT)[:, None])
        tl.store(weights_ptr + (place + split) * KEPT + rows, highest + tl.log2(divisor), mask=rows < KEPT)
        # Every thread's part is stored before one of them announces it.
        tl.debug_barrier()
        counter = counters_ptr + tile * tl.num_programs(1) + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
            tl.store(counter, 0)
            kept = tl.arange(0, KEPT)
            summed = _add_parts(partial_ptr, weights_ptr, place, active, COLUMNS, KEPT, SPLITS, CHUNK)
            tokens, heads = kept // GROUP, head * GROUP + kept % GROUP
            out = out_ptr + (first_row + tokens)[:, None] * out_stride + heads[:, None] * HEAD_DIM + columns[None, :]
            tl.store(out, summed.to(out_ptr.dtype.element_ty), mask=(tokens < count)[:, None] & real[None, :])


@triton.jit
def _add_parts(
    partial_ptr, weights_ptr, place, active, COLUMNS: tl.constexpr, KEPT: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr
):
    """The parts' mean [kept, columns], each weighted by the exponential of what its scores amount to."""
    splits, kept, columns = tl.arange(0, SPLITS), tl.arange(0, KEPT), tl.arange(0, COLUMNS)
    weights = tl.load(
        weights_ptr + (place + splits)[:, None] * KEPT + kept[None, :],
        mask=(splits < active)[:, None],
        other=-float("inf"),
        cache_modifier=".cg",
    )
    highest = tl.max(weights, axis=0)
    total = tl.sum(tl.exp2(weights - highest[None, :]), axis=0)
    summed = tl.zeros((KEPT, COLUMNS), dtype=tl.float32)
    for start in range(0, active, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        weight = tl.load(
            weights_ptr + (place + chunk)[:, None] * KEPT + kept[None, :],
            mask=(chunk < active)[:, None],
            other=-float("inf"),
            cache_modifier=".cg",
        )
        share = tl.exp2(weight - highest[None, :]) / total[None, :]
        cells = (place + chunk)[:, None, None] * (KEPT * COLUMNS) + kept[None, :, None] * COLUMNS + columns[None, None, :]
        part = tl.load(partial_ptr + cells, mask=(chunk < active)[:, None, None], other=0.0, cache_modifier=".cg")
        summed += tl.sum(part * share[:, :, None], axis=0)
    return summed

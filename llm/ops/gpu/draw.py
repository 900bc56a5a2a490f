# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Draws a token from each row by temperature, top_k, top_p and min_p, without sorting and without the host.

The same distribution and the same inversion as llm.sampling: the kept tokens' weights are summed in order of ids, and the first at
which the running sum exceeds uniform * total is drawn. Which tokens are kept is one threshold on the weight, and how many of those
that equal it (lower ids first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.ops.gpu.weight_threshold import (
    LOW_BITS,
    SCALE,
    TOP_K,
    TOP_P,
    all_parts,
    collect_kernel,
    count_digits,
    fixed,
    narrow_kernel,
    settle_kernel,
    weights_of,
)

_PART = 4096
"""Tokens of a row that one program looks at."""
_LANES = 256
"""Of these, at once."""
_BISECTED = 1024


@dataclass(frozen=True)
class DrawParameters:
    """One value a row, [n]: float32, int32 (0 keeps all), float64, float32, and a float64 uniform in [0, 1).

    `any_top_k`, `any_top_p`: whether some row uses them; if none does, the launches that serve them are spared.
    """

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    uniforms: torch.Tensor
    any_top_k: bool = True
    any_top_p: bool = True


@triton.jit
def _highest_kernel(logits_ptr, highest_ptr, width, stride, parts, PART: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * PART + tl.arange(0, PART)
    values = tl.load(logits_ptr + row.to(tl.int64) * stride + columns, mask=columns < width, other=-float("inf"))
    tl.store(highest_ptr + row * parts + part, tl.max(values, axis=0))


@triton.jit
def _weigh_kernel(
    logits_ptr, highest_ptr, weights_ptr, temperatures_ptr, counts_ptr, sums_ptr, width, stride, parts,
    PARTS: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr, LOW_BITS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The weights, and their first digits. What is not a number weighs nothing."""
    row, part = tl.program_id(0), tl.program_id(1)
    every = tl.arange(0, PARTS)
    highest = tl.max(tl.load(highest_ptr + row * parts + every, mask=every < parts, other=-float("inf")), axis=0)
    temperature = tl.maximum(tl.load(temperatures_ptr + row), 1e-30)
    columns = part * PART + tl.arange(0, PART)
    values = tl.load(logits_ptr + row.to(tl.int64) * stride + columns, mask=columns < width, other=-float("inf"))
    weights = tl.exp((values - highest) / temperature)
    weights = tl.where(weights >= 0, weights, 0.0)
    tl.store(weights_ptr + row.to(tl.int64) * width + columns, weights, mask=columns < width)
    tl.debug_barrier()
    count_digits(weights_ptr, counts_ptr, sums_ptr, row, part, parts, width, 0, LOW_BITS + 4, PART, LANES, SCALE)


@triton.jit
def _begin_kernel(sums_ptr, thresholds_ptr, equals_ptr, totals_ptr, width, parts, PARTS: tl.constexpr):
    """Without a filter everything is kept."""
    row = tl.program_id(0)
    tl.store(thresholds_ptr + row, 0)
    tl.store(equals_ptr + row, width)
    tl.store(totals_ptr + row, tl.sum(all_parts(sums_ptr, row, parts, tl.arange(0, 16), PARTS), axis=0))


@triton.jit
def _kept_kernel(
    weights_ptr, min_ps_ptr, thresholds_ptr, kept_equals_ptr, kept_sums_ptr, width, parts, PART: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """A part's weights beyond the threshold, and how many equal it. min_p raises the threshold, and then all that equal it stay."""
    row, part = tl.program_id(0), tl.program_id(1)
    floor, threshold = tl.load(min_ps_ptr + row).to(tl.int32, bitcast=True), tl.load(thresholds_ptr + row)
    _, bits, weight = weights_of(weights_ptr, row, part * PART, width, PART)
    threshold = tl.maximum(threshold, floor)
    tl.store(kept_equals_ptr + row * parts + part, tl.sum((bits == threshold).to(tl.int32), axis=0))
    tl.store(kept_sums_ptr + row * parts + part, tl.sum(tl.where(bits > threshold, fixed(weight, SCALE), 0), axis=0))


@triton.jit
def _pick_kernel(
    weights_ptr, min_ps_ptr, uniforms_ptr, thresholds_ptr, equals_ptr, kept_equals_ptr, kept_sums_ptr, out_ptr, width, parts,
    PARTS: tl.constexpr, PART: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The program whose part holds the drawn token writes it; where nothing weighs anything, the first writes token 0."""
    row, part = tl.program_id(0), tl.program_id(1)
    floor, threshold, equals = (
        tl.load(min_ps_ptr + row).to(tl.int32, bitcast=True), tl.load(thresholds_ptr + row), tl.load(equals_ptr + row)
    )  # fmt: skip
    equals = tl.where(floor > threshold, width, equals)
    threshold = tl.maximum(threshold, floor)
    one = fixed(threshold.to(tl.float32, bitcast=True), SCALE)
    every = tl.arange(0, PARTS)
    num_equal = tl.load(kept_equals_ptr + row * parts + every, mask=every < parts, other=0).to(tl.int64)
    before = tl.cumsum(num_equal, axis=0) - num_equal
    stay = tl.minimum(tl.maximum(equals - before, 0), num_equal)
    sums = tl.load(kept_sums_ptr + row * parts + every, mask=every < parts, other=0) + stay * one
    total = tl.sum(sums, axis=0)
    target = tl.minimum((tl.load(uniforms_ptr + row) * total.to(tl.float64)).to(tl.int64), total - 1)
    running = tl.sum(tl.where(every < part, sums, 0), axis=0)
    own = tl.sum(tl.where(every == part, sums, 0), axis=0)
    if (part == 0) & (total <= 0):
        tl.store(out_ptr + row, 0)
    if (running <= target) & (target < running + own):
        columns, bits, weight = weights_of(weights_ptr, row, part * PART, width, PART)
        equal = (bits == threshold).to(tl.int64)
        rank = tl.sum(tl.where(every == part, before, 0), axis=0) + tl.cumsum(equal, axis=0)
        keeps = (bits > threshold) | ((equal > 0) & (rank <= equals))
        sums_so_far = running + tl.cumsum(tl.where(keeps, fixed(weight, SCALE), 0), axis=0)
        tl.store(out_ptr + row, tl.min(tl.where(keeps & (sums_so_far > target), columns, width), axis=0))


def draw(logits: torch.Tensor, parameters: DrawParameters, out: torch.Tensor) -> None:
    """logits [n, vocab] float32 -> out [n] int32. A temperature of 0 draws the likeliest token (the lowest id but for rounding)."""
    rows, width = logits.shape
    if not rows:
        return
    parts, given, device = triton.cdiv(width, _PART), parameters, logits.device
    shape = {"PARTS": triton.next_power_of_2(parts), "PART": _PART}
    scale = {"SCALE": SCALE.value}
    digits = {**shape, **scale, "LANES": _LANES, "LOW_BITS": LOW_BITS.value}

    def integers(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int64, device=device)

    weights = torch.empty(rows, width, dtype=torch.float32, device=device)
    collected = torch.empty(rows, width, dtype=torch.int32, device=device)
    highest = torch.empty(rows, parts, dtype=torch.float32, device=device)
    first, second = (integers(rows, parts, 16), integers(rows, parts, 16)), (integers(rows, parts, 16), integers(rows, parts, 16))
    thresholds = torch.empty(rows, dtype=torch.int32, device=device)
    equals, totals, kept_equals, kept_sums = integers(rows), integers(rows), integers(rows, parts), integers(rows, parts)
    whole, each = (rows,), (rows, parts)
    _highest_kernel[each](logits, highest, width, logits.stride(0), parts, PART=_PART)
    _weigh_kernel[each](logits, highest, weights, given.temperatures, *first, width, logits.stride(0), parts, **digits)
    _begin_kernel[whole](first[1], thresholds, equals, totals, width, parts, PARTS=shape["PARTS"])
    filters = (given.top_ks, given.top_ps)
    for kind in [TOP_K.value] * given.any_top_k + [TOP_P.value] * given.any_top_p:
        which = {"KIND": kind, "TOP_K": TOP_K.value}
        narrow_kernel[each](weights, *first, *second, *filters, totals, width, parts, **which, **digits)
        collect_kernel[each](
            weights, collected, *first, *second, *filters, totals, width, parts, **which, **shape, LOW_BITS=LOW_BITS.value
        )
        settle_kernel[whole](
            collected, *first, *second, *filters, thresholds, equals, totals, width, parts,
            **which, **scale, PARTS=shape["PARTS"], BISECTED=_BISECTED, LOW_BITS=LOW_BITS.value,
        )  # fmt: skip
    _kept_kernel[each](weights, given.min_ps, thresholds, kept_equals, kept_sums, width, parts, PART=_PART, **scale)
    _pick_kernel[each](
        weights, given.min_ps, given.uniforms, thresholds, equals, kept_equals, kept_sums, out, width, parts, **shape, **scale
    )

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Draws a token from each row by temperature, top_k, top_p and min_p, without sorting and without the host.

The same distribution and the same inversion as llm.sampling: the kept tokens' weights are summed in order of ids, and the first at
which the running sum exceeds uniform * total is drawn. Which tokens are kept is one threshold on the weight, and how many of those
that equal it (lower ids first). Weights are at most 1 and their bits grow with them, so the threshold is bisected bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_ONE = tl.constexpr(0x3F800000)
"""The bits of 1.0, the largest weight."""


@dataclass(frozen=True)
class DrawParameters:
    """One value a row, [n]: float32, int32 (0 keeps all), float32, float32, and a float64 uniform in [0, 1)."""

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    uniforms: torch.Tensor


@triton.jit
def _mass(weights_ptr, width, threshold, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The number, or else the sum in float64, of the weights whose bits are at least `threshold`."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        weight = tl.load(weights_ptr + columns, mask=columns < width, other=-1.0)
        kept = weight.to(tl.int32, bitcast=True) >= threshold
        kept = kept & (columns < width)
        total += tl.where(kept, 1.0 if COUNTS else weight, 0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(weights_ptr, width, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """The largest bits b with mass(b) >= wanted; 0 if there are none."""
    low, high = wanted.to(tl.int32) * 0, wanted.to(tl.int32) * 0 + (ONE + 1)
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = _mass(weights_ptr, width, middle, COUNTS, BLOCK) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def _draw_kernel(
    logits_ptr, weights_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, uniforms_ptr, out_ptr, width, stride,
    BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    weights_ptr += row.to(tl.int64) * width
    highest = tl.max(tl.full((1,), -float("inf"), tl.float32), axis=0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits_ptr + columns, mask=columns < width, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(values, axis=0))
    temperature = tl.maximum(tl.load(temperatures_ptr + row), 1e-30)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits_ptr + columns, mask=columns < width, other=-float("inf"))
        tl.store(weights_ptr + columns, tl.exp((values - highest) / temperature), mask=columns < width)
    tl.debug_barrier()
    threshold = highest.to(tl.int32) * 0
    total = _mass(weights_ptr, width, threshold, False, BLOCK)
    everything = total * 0.0 + width
    equals = everything
    top_k = tl.load(top_ks_ptr + row)
    if (top_k > 0) & (top_k < width):
        threshold = _bisect(weights_ptr, width, top_k.to(tl.float64), True, BLOCK, ONE)
        equals = top_k - _mass(weights_ptr, width, threshold + 1, True, BLOCK)
        total = _mass(weights_ptr, width, threshold + 1, False, BLOCK) + equals * threshold.to(tl.float32, bitcast=True)
    top_p = tl.load(top_ps_ptr + row)
    if top_p < 1.0:
        wanted = top_p.to(tl.float64) * total
        found = _bisect(weights_ptr, width, wanted, False, BLOCK, ONE)
        found = tl.maximum(found, threshold)
        missing = wanted - _mass(weights_ptr, width, found + 1, False, BLOCK)
        needed = tl.maximum(tl.ceil(missing / tl.maximum(found.to(tl.float32, bitcast=True), 1e-38)), 1.0)
        equals = tl.where(found > threshold, needed, tl.minimum(needed, equals))
        threshold = found
    floor = tl.load(min_ps_ptr + row).to(tl.int32, bitcast=True)
    if floor > threshold:
        threshold, equals = floor, everything
    _pick(weights_ptr, out_ptr + row, width, threshold, equals, tl.load(uniforms_ptr + row), BLOCK)


@triton.jit
def _kept(weights_ptr, start, width, threshold, equals, BLOCK: tl.constexpr):
    """A block's weights in float64 with those dropped at zero, and how many of the `equals` remain after it."""
    columns = start + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + columns, mask=columns < width, other=0.0)
    bits = weight.to(tl.int32, bitcast=True)
    equal = ((bits == threshold) & (columns < width)).to(tl.int32)
    keeps = (bits > threshold) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= equals))
    keeps = keeps & (columns < width)
    return tl.where(keeps, weight, 0.0).to(tl.float64), equals - tl.sum(equal, axis=0)


@triton.jit
def _pick(weights_ptr, out_ptr, width, threshold, equals, uniform, BLOCK: tl.constexpr):
    total, left = uniform * 0.0, equals
    for start in range(0, width, BLOCK):
        weight, left = _kept(weights_ptr, start, width, threshold, left, BLOCK)
        total += tl.sum(weight, axis=0)
    target, running, left, drawn, last = uniform * total, uniform * 0.0, equals, width, threshold * 0
    for start in range(0, width, BLOCK):
        weight, left = _kept(weights_ptr, start, width, threshold, left, BLOCK)
        columns = start + tl.arange(0, BLOCK)
        beyond = (running + tl.cumsum(weight, axis=0) > target) & (weight > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(beyond, columns, width), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, columns, 0), axis=0))
        running += tl.sum(weight, axis=0)
    tl.store(out_ptr, tl.where(drawn < width, drawn, last).to(tl.int32))


def draw(logits: torch.Tensor, parameters: DrawParameters, out: torch.Tensor) -> None:
    """logits [n, vocab] float32 -> out [n] int32. A temperature of 0 draws the likeliest token (the lowest id but for rounding)."""
    rows, width = logits.shape
    weights = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    given = parameters
    if rows:
        _draw_kernel[(rows,)](
            logits, weights, given.temperatures, given.top_ks, given.top_ps, given.min_ps, given.uniforms, out,
            width, logits.stride(0), BLOCK=_BLOCK, ONE=_ONE.value, num_warps=16,
        )  # fmt: skip

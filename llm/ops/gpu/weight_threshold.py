# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Finds the threshold of a top_k or top_p filter among a row's weights, without sorting.

Weights are at most 1 and their bits grow with them, so a threshold is found like a number in a radix sort: two digits of 4 bits by
counting over the whole row, many programs to a row; then the few weights that share these are copied together, and the last 22 bits
are bisected among them by one program. Weights are summed as integers, so no result depends on who added what first.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE = tl.constexpr(float(1 << 42))
"""Of the integers that stand for weights: the sum of two million weights of 1 fits into 63 bits."""
TOP_K, TOP_P = tl.constexpr(0), tl.constexpr(1)
LOW_BITS = tl.constexpr(22)
"""Those below the two digits."""


@triton.jit
def fixed(weight, SCALE: tl.constexpr):
    return (weight * SCALE).to(tl.int64)


@triton.jit
def weights_of(weights_ptr, row, start, width, LANES: tl.constexpr):
    """Their ids and bits; beyond the row's end the bits are -1."""
    columns = start + tl.arange(0, LANES)
    weight = tl.load(weights_ptr + row.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
    return columns, tl.where(columns < width, weight.to(tl.int32, bitcast=True), -1), weight


@triton.jit
def all_parts(values_ptr, row, parts, digits, PARTS: tl.constexpr):
    """values [rows, parts, 16] -> the row's sums over its parts, [16]."""
    part = tl.arange(0, PARTS)[:, None]
    values = tl.load(values_ptr + (row * parts + part) * 16 + digits[None, :], mask=part < parts, other=0)
    return tl.sum(values.to(tl.int64), axis=0)


@triton.jit
def _digit_of(sums, wanted, above):
    """The highest digit with `wanted` at or above it, counting `above` beyond the highest; and what lies beyond that digit."""
    digits = tl.arange(0, 16)
    reached = tl.sum(tl.where(digits[None, :] >= digits[:, None], sums[None, :], 0), axis=1) + above
    digit = tl.max(tl.where(reached >= wanted, digits, 0), axis=0)
    return digit, above + tl.sum(tl.where(digits > digit, sums, 0), axis=0)


@triton.jit
def _wanted(kind: tl.constexpr, row, width, top_ks_ptr, top_ps_ptr, totals_ptr, TOP_K: tl.constexpr):
    """What must lie at or above the threshold, a number or a sum of weights; 0 if this filter is not used in this row."""
    if kind == TOP_K:
        top_k = tl.load(top_ks_ptr + row)
        return tl.where(top_k < width, top_k, 0).to(tl.int64)
    top_p = tl.load(top_ps_ptr + row).to(tl.float64)
    wanted = tl.ceil(top_p * tl.load(totals_ptr + row).to(tl.float64)).to(tl.int64)
    return tl.where(top_p < 1.0, tl.maximum(wanted, 1), 0)


@triton.jit
def count_digits(
    weights_ptr, counts_ptr, sums_ptr, row, part, parts, width, prefix, SHIFT: tl.constexpr,
    PART: tl.constexpr, LANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """For each 4-bit digit at SHIFT of a part's weights whose bits above it are `prefix`: how many there are, and their sum."""
    digits = tl.arange(0, 16)
    counts = tl.zeros((16, LANES), dtype=tl.int32)
    sums = tl.zeros((16, LANES), dtype=tl.int64)
    for start in range(part * PART, min(part * PART + PART, width), LANES):
        _, bits, weight = weights_of(weights_ptr, row, start, width, LANES)
        digit = tl.where((bits >> (SHIFT + 4)) == prefix, (bits >> SHIFT) & 15, 16)
        same = digit[None, :] == digits[:, None]
        counts += same.to(tl.int32)
        sums += tl.where(same, fixed(weight, SCALE)[None, :], 0)
    place = (row * parts + part) * 16 + digits
    tl.store(counts_ptr + place, tl.sum(counts, axis=1))
    tl.store(sums_ptr + place, tl.sum(sums, axis=1))


@triton.jit
def narrow_kernel(
    weights_ptr, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, top_ks_ptr, top_ps_ptr, totals_ptr, width, parts,
    KIND: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr,
    LOW_BITS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Counts the second digits of the weights that share the threshold's first."""
    row, part = tl.program_id(0), tl.program_id(1)
    wanted = _wanted(KIND, row, width, top_ks_ptr, top_ps_ptr, totals_ptr, TOP_K)
    if wanted > 0:
        values_ptr = first_counts_ptr if KIND == TOP_K else first_sums_ptr
        digit, _ = _digit_of(all_parts(values_ptr, row, parts, tl.arange(0, 16), PARTS), wanted, wanted * 0)
        count_digits(weights_ptr, counts_ptr, sums_ptr, row, part, parts, width, digit, LOW_BITS, PART, LANES, SCALE)


@triton.jit
def _prefix_of(
    KIND: tl.constexpr, wanted, row, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, parts,
    TOP_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The threshold's two digits, and how many weights exceed these digits, and their sum."""
    digits = tl.arange(0, 16)
    first_counts, first_sums = (
        all_parts(first_counts_ptr, row, parts, digits, PARTS), all_parts(first_sums_ptr, row, parts, digits, PARTS)
    )  # fmt: skip
    counts, sums = all_parts(counts_ptr, row, parts, digits, PARTS), all_parts(sums_ptr, row, parts, digits, PARTS)
    if KIND == TOP_K:
        first, above = _digit_of(first_counts, wanted, wanted * 0)
        second, _ = _digit_of(counts, wanted, above)
    else:
        first, above = _digit_of(first_sums, wanted, wanted * 0)
        second, _ = _digit_of(sums, wanted, above)
    num_above = tl.sum(tl.where(digits > first, first_counts, 0) + tl.where(digits > second, counts, 0), axis=0)
    sum_above = tl.sum(tl.where(digits > first, first_sums, 0) + tl.where(digits > second, sums, 0), axis=0)
    return first * 16 + second, second, num_above, sum_above


@triton.jit
def collect_kernel(
    weights_ptr, collected_ptr, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, top_ks_ptr, top_ps_ptr, totals_ptr,
    width, parts, KIND: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LOW_BITS: tl.constexpr,
):  # fmt: skip
    """Copies the bits of the weights that share both digits together."""
    row, part = tl.program_id(0), tl.program_id(1)
    wanted = _wanted(KIND, row, width, top_ks_ptr, top_ps_ptr, totals_ptr, TOP_K)
    if wanted > 0:
        prefix, second, _, _ = _prefix_of(
            KIND, wanted, row, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, parts, TOP_K, PARTS
        )
        every = tl.arange(0, PARTS)
        before = tl.sum(tl.load(counts_ptr + (row * parts + every) * 16 + second, mask=every < part, other=0), axis=0)
        _, bits, _ = weights_of(weights_ptr, row, part * PART, width, PART)
        shares = ((bits >> LOW_BITS) == prefix).to(tl.int32)
        place = before + tl.cumsum(shares, axis=0) - 1
        tl.store(collected_ptr + row.to(tl.int64) * width + place, bits, mask=shares > 0)


@triton.jit
def _beyond(collected_ptr, num, threshold, BISECTED: tl.constexpr, SCALE: tl.constexpr):
    """How many of the collected weights are at or beyond the threshold, and their sum."""
    counts = tl.zeros((BISECTED,), dtype=tl.int64)
    sums = tl.zeros((BISECTED,), dtype=tl.int64)
    for start in range(0, num, BISECTED):
        place = start + tl.arange(0, BISECTED)
        bits = tl.load(collected_ptr + place, mask=place < num, other=-1)
        counts += (bits >= threshold).to(tl.int64)
        sums += tl.where(bits >= threshold, fixed(bits.to(tl.float32, bitcast=True), SCALE), 0)
    return tl.sum(counts, axis=0), tl.sum(sums, axis=0)


@triton.jit
def settle_kernel(
    collected_ptr, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, top_ks_ptr, top_ps_ptr, thresholds_ptr, equals_ptr,
    totals_ptr, width, parts, KIND: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, BISECTED: tl.constexpr,
    LOW_BITS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Finds the threshold's low bits, and how many of those that equal it are kept."""
    row = tl.program_id(0)
    wanted = _wanted(KIND, row, width, top_ks_ptr, top_ps_ptr, totals_ptr, TOP_K)
    if wanted > 0:
        prefix, second, num_above, sum_above = _prefix_of(
            KIND, wanted, row, first_counts_ptr, first_sums_ptr, counts_ptr, sums_ptr, parts, TOP_K, PARTS
        )
        every = tl.arange(0, PARTS)
        num = tl.sum(tl.load(counts_ptr + (row * parts + every) * 16 + second, mask=every < parts, other=0), axis=0)
        collected_ptr += row.to(tl.int64) * width
        found = prefix << LOW_BITS
        for shift in range(LOW_BITS):
            tried = found | (1 << (LOW_BITS - 1 - shift))
            count, total = _beyond(collected_ptr, num, tried, BISECTED, SCALE)
            reached = (num_above + count) if KIND == TOP_K else (sum_above + total)
            found = tl.where(reached >= wanted, tried, found)
        count, total = _beyond(collected_ptr, num, found + 1, BISECTED, SCALE)
        num_above, sum_above = num_above + count, sum_above + total
        one = fixed(found.to(tl.float32, bitcast=True), SCALE)
        if KIND == TOP_K:
            tl.store(thresholds_ptr + row, found)
            tl.store(equals_ptr + row, wanted - num_above)
            tl.store(totals_ptr + row, sum_above + (wanted - num_above) * one)
        else:
            needed = tl.maximum((wanted - sum_above + one - 1) // tl.maximum(one, 1), 1)
            threshold, equals = tl.load(thresholds_ptr + row), tl.load(equals_ptr + row)
            if found > threshold:
                tl.store(thresholds_ptr + row, found)
                tl.store(equals_ptr + row, needed)
            elif found == threshold:
                tl.store(equals_ptr + row, tl.minimum(needed, equals))

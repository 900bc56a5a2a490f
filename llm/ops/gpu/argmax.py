# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""The likeliest token of each row; the lowest id among equals, as numpy has it. The result stays on the device.

Values and indices are packed into one ordered 64-bit key, so that the parts of a row meet in a single maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs

_BLOCK = 4096


@triton.jit
def _argmax_kernel(
    logits_ptr, keys_ptr, counters_ptr, out_ptr, width, stride, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(EARLY)
    values = tl.load(logits_ptr + row.to(tl.int64) * stride + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    ordered = tl.where(columns < width, ordered, -0x80000000)
    key = tl.max(ordered * 4294967296 + (0x7FFFFFFF - columns), axis=0)
    tl.store(keys_ptr + row * PARTS + part, key)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) - 1:
        parts = tl.arange(0, PARTS)
        keys = tl.load(
            keys_ptr + row * PARTS + parts, mask=parts < tl.num_programs(1), other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg"
        )
        tl.store(out_ptr + row, (0x7FFFFFFF - (tl.max(keys, axis=0) & 0xFFFFFFFF)).to(tl.int32))
        tl.store(counters_ptr + row, 0)


class Argmax:
    """Keeps the counters by which the last part of a row knows that it is the last; they are zero between calls."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        parts = triton.next_power_of_2(triton.cdiv(vocab_size, _BLOCK))
        self._keys = torch.empty(max_rows, parts, dtype=torch.int64, device=device)
        self._counters = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def __call__(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """logits [n, vocab] -> out [n] int32. One call at a time."""
        rows, width = logits.shape
        _argmax_kernel[(rows, triton.cdiv(width, _BLOCK))](
            logits,
            self._keys,
            self._counters,
            out,
            width,
            logits.stride(0),
            PARTS=self._keys.shape[1],
            BLOCK=_BLOCK,
            num_warps=8,
            **dependent_launch(),
        )

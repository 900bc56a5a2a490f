# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""y = x W^T for few rows of x, with what stands before and after it in a decoder layer folded in.

Before: RMSNorm of x; for a single row as a factor of the sums (they run over x * norm weight, and x^2 is summed beside them), else
in a launch of its own. After: a bias; a residual that the result is added to; or SiLU(gate) * up, for a W whose first half is gate.
With few rows the time is that of reading W once, so W takes the wide side of the matrix unit: y^T = W x^T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs
from llm.ops.gpu.rms_norm import rms_norm

MAX_ROWS = 64
"""More rows than this belong to the library's matrix product."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: outputs and inputs a program takes at a time, warps, and loads in flight."""

    outputs: int
    inputs: int
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class Around:
    """What is computed with it. At most one of `residual` and `silu_mul`."""

    norm: torch.Tensor | None = None
    """[d] weight of an RMSNorm that x passes first."""
    eps: float = 1e-5
    bias: torch.Tensor | None = None
    """[outputs]"""
    residual: torch.Tensor | None = None
    """[n, outputs], the result is added to it in place."""
    silu_mul: bool = False
    float32: bool = False
    """Results in float32 whatever x's type is (logits)."""


@triton.jit
def _skinny_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, num_rows, width, height, x_stride, eps,
    NORMS: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """NORMS is for _vector_kernel: here it would cost each program more instructions than the product itself."""
    tl.static_assert(not NORMS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    weights = weight_ptr + tl.minimum(outputs, height - 1).to(tl.int64)[:, None] * width + inputs[None, :]
    values = x_ptr + rows[None, :] * x_stride + inputs[:, None]
    wait_for_inputs(EARLY)
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    second = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in tl.range(0, width, INPUTS, num_stages=STAGES):
        if EVEN:
            weight = tl.load(weights + start)
            x = tl.load(values + start, mask=(rows < num_rows)[None, :], other=0.0)
        else:
            inside = start + inputs < width
            weight = tl.load(weights + start, mask=inside[None, :], other=0.0)
            x = tl.load(values + start, mask=(rows < num_rows)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
        if SILU:
            if EVEN:
                up = tl.load(weights + height.to(tl.int64) * width + start)
            else:
                up = tl.load(weights + height.to(tl.int64) * width + start, mask=inside[None, :], other=0.0)
            second = tl.dot(up, x, second, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + outputs, mask=outputs < height, other=0.0).to(tl.float32)[:, None]
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * second
    place = out_ptr + rows.to(tl.int64)[None, :] * height + outputs[:, None]
    inside = (rows < num_rows)[None, :] & (outputs < height)[:, None]
    if ADDS:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _take_in(
    weight, up, x_ptrs, norm_ptrs, inside, totals, seconds, squares, NORMS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Adds the products of one step's inputs to the sums."""
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        squares += x * x
        x *= tl.load(norm_ptrs, mask=inside, other=0.0).to(tl.float32)
    totals += weight.to(tl.float32) * x[None, :]
    if SILU:
        seconds += up.to(tl.float32) * x[None, :]
    return totals, seconds, squares


@triton.jit
def _vector_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, num_rows, width, height, x_stride, eps,
    NORMS: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The same for one row, without the matrix unit: W goes straight to registers, 16 bytes a thread."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    weights = weight_ptr + tl.minimum(outputs, height - 1).to(tl.int64)[:, None] * width + inputs[None, :]
    totals = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    seconds = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    squares = tl.zeros((INPUTS,), dtype=tl.float32)
    # No kernel writes weights: the first of them are on their way while x is still being computed.
    inside = inputs < width
    weight = tl.load(weights, mask=inside[None, :] | EVEN, other=0.0)
    up = weight
    if SILU:
        up = tl.load(weights + height.to(tl.int64) * width, mask=inside[None, :] | EVEN, other=0.0)
    wait_for_inputs(EARLY)
    totals, seconds, squares = _take_in(
        weight, up, x_ptr + inputs, norm_ptr + inputs, inside, totals, seconds, squares, NORMS, SILU
    )
    for start in tl.range(INPUTS, width, INPUTS, num_stages=STAGES):
        columns = start + inputs
        inside = columns < width
        weight = tl.load(weights + start, mask=inside[None, :] | EVEN, other=0.0)
        up = weight
        if SILU:
            up = tl.load(weights + height.to(tl.int64) * width + start, mask=inside[None, :] | EVEN, other=0.0)
        totals, seconds, squares = _take_in(
            weight, up, x_ptr + columns, norm_ptr + columns, inside, totals, seconds, squares, NORMS, SILU
        )
    total, second = tl.sum(totals, axis=1), tl.sum(seconds, axis=1)
    if NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
        total, second = total * scale, second * scale
    inside = outputs < height
    if BIAS:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * second
    if ADDS:
        total += tl.load(out_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, total.to(out_ptr.dtype.element_ty), mask=inside)


def choose_tile(rows: int, width: int, height: int) -> Tile:
    """Few outputs a program, so that multiprocessors have about equal shares of them; measured on an H100 with bench.kernels."""
    if rows == 1:
        return Tile(2, 2048, num_warps=4, num_stages=2) if width > 8192 else Tile(4, 1024, num_warps=4, num_stages=2)
    return Tile(64, 128, num_warps=4, num_stages=4) if height > 4096 else Tile(16, 256, num_warps=4, num_stages=4)


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, around: Around | None = None, tile: Tile | None = None) -> torch.Tensor:
    """x [n, d] with n <= MAX_ROWS, weight [outputs, d] of x's type -> [n, outputs], or [n, outputs / 2] with SiLU * up.

    With a residual that tensor is returned.
    """
    around = around or Around()
    rows, width = x.shape
    if around.norm is not None and rows > 1:
        x, around = rms_norm(x, around.norm, around.eps), replace(around, norm=None)
    height = weight.shape[0] // (2 if around.silu_mul else 1)
    out = around.residual
    if out is None:
        out = torch.empty(rows, height, dtype=torch.float32 if around.float32 else x.dtype, device=x.device)
    tile = tile or choose_tile(rows, width, height)
    inputs = min(tile.inputs, max(16, triton.next_power_of_2(width)))
    padded = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
    kernel = _vector_kernel if rows == 1 else _skinny_kernel
    unused = weight
    if rows:
        kernel[(triton.cdiv(height, tile.outputs), triton.cdiv(rows, padded))](
            x, weight, unused if around.norm is None else around.norm, unused if around.bias is None else around.bias, out,
            rows, width, height, x.stride(0), around.eps,
            NORMS=around.norm is not None, BIAS=around.bias is not None, ADDS=around.residual is not None, SILU=around.silu_mul,
            EVEN=width % inputs == 0, ROWS=padded, OUTPUTS=tile.outputs, INPUTS=inputs, STAGES=tile.num_stages,
            num_warps=tile.num_warps, **dependent_launch(),
        )  # fmt: skip
    return out


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor, around: Around) -> torch.Tensor:
    """The same in torch, in float64, on a copy of the residual."""
    wide = x.double()
    if around.norm is not None:
        wide = torch.nn.functional.rms_norm(wide, (x.shape[1],), around.norm.double(), around.eps)
    out = torch.nn.functional.linear(wide, weight.double(), None if around.bias is None else around.bias.double())
    if around.silu_mul:
        gate, up = out.chunk(2, dim=-1)
        out = torch.nn.functional.silu(gate) * up
    return out if around.residual is None else around.residual.double() + out

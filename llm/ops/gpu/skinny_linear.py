# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""y = x W^T for few rows of x, with what stands before and after it in a decoder layer folded in.

With few rows the time is that of reading W once. For a single row RMSNorm of x is a factor of the sums (they run over x * norm
weight, and x^2 is summed beside them), and the result is added to the residual; some products take whole rows of W then
(llm.ops.gpu.whole_rows). For several rows W takes the wide side of the matrix unit, y^T = W x^T, and each program reads all of x
that belongs to its inputs: with 64 outputs a program that costs a quarter of what W does for 16 rows; with 16 outputs, as much.
Where tiles so wide leave multiprocessors idle, several programs share the inputs of an output (`linear_parts`), and the norm
behind, which reads the result anyway, adds up their sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs
from llm.ops.gpu.whole_rows import HEAD_OUTPUTS, MULTIPROCESSORS, Around, choose_whole_rows, take_whole_rows

MAX_ROWS = 64
"""More rows than this belong to the library's matrix product."""
_MOST_SPLITS = 4
"""Each part is written and read once more, in float32."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: outputs and inputs (half as many in float32) a program takes at a time, warps, and loads in flight."""

    outputs: int
    inputs: int
    num_warps: int = 4
    num_stages: int = 4


@triton.jit
def _skinny_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, num_rows, width, height, span, x_stride, eps,
    NORMS: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Programs of the third axis take `span` inputs each, and leave their sums in parts of `out`.

    NORMS and ADDS are for _vector_kernel: here a norm would cost each program more instructions than the product itself.
    """
    tl.static_assert(not NORMS and not ADDS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    weights = weight_ptr + tl.minimum(outputs, height - 1).to(tl.int64)[:, None] * width + inputs[None, :]
    values = x_ptr + rows[None, :] * x_stride + inputs[:, None]
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, width)
    wait_for_inputs(EARLY)
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    second = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in tl.range(begin, end, INPUTS, num_stages=STAGES):
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
    place = out_ptr + (tl.program_id(2) * num_rows + rows).to(tl.int64)[None, :] * height + outputs[:, None]
    inside = (rows < num_rows)[None, :] & (outputs < height)[:, None]
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
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, num_rows, width, height, span, x_stride, eps,
    NORMS: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The same for one row, without the matrix unit: W goes straight to registers, 16 bytes a thread. `span` is all of `width`."""
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


def choose_tile(rows: int, width: int, height: int, *, silu_mul: bool = False) -> Tile:
    """Measured within whole decode steps of Llama-3.1-8B on an H200; on an H100 only product by product, with bench.kernels.

    One row: few outputs a program, so that multiprocessors have about equal shares, unless there are very many (the head).
    Several: the most loads in flight that gain something; with SiLU twice as much is in flight, and a fifth would not fit.
    """
    if rows == 1:
        if height > HEAD_OUTPUTS:
            return Tile(16, 256, num_warps=4, num_stages=3)
        return Tile(2, 2048, num_warps=4, num_stages=2) if width > 8192 else Tile(4, 1024, num_warps=4, num_stages=2)
    return Tile(64, 128, num_warps=4, num_stages=4 if silu_mul or max(width, height) > 8192 else 5)


def choose_splits(height: int, tile: Tile) -> int:
    """Programs that share the inputs of an output, a power of two: as many as still run at the same time."""
    programs = -(-height // tile.outputs)
    return min(_MOST_SPLITS, 1 << max(0, (MULTIPROCESSORS // programs).bit_length() - 1))


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, around: Around | None = None, tile: Tile | None = None) -> torch.Tensor:
    """x [n, d] with n <= MAX_ROWS, weight [outputs, d] of x's type -> [n, outputs], or [n, outputs / 2] with SiLU * up.

    With a residual that tensor is returned.
    """
    around = around or Around()
    rows, width = x.shape
    height = weight.shape[0] // (2 if around.silu_mul else 1)
    out = around.residual
    if out is None:
        out = torch.empty(rows, height, dtype=torch.float32 if around.float32 else x.dtype, device=x.device)
    whole = choose_whole_rows(width, height, x.element_size()) if rows == 1 and tile is None and not around.silu_mul else None
    if whole is None:
        _launch(x, weight, around, tile or choose_tile(rows, width, height, silu_mul=around.silu_mul), out)
    else:
        take_whole_rows(x, weight, around, whole, out)
    return out


def linear_parts(x: torch.Tensor, weight: torch.Tensor, splits: int | None = None, tile: Tile | None = None) -> torch.Tensor:
    """x W^T of several rows as float32 parts [splits, n, outputs] that are yet to be added up, see rms_norm.add_rms_norm."""
    (rows, width), height = x.shape, weight.shape[0]
    tile = tile or choose_tile(rows, width, height)
    parts = torch.empty(splits or choose_splits(height, tile), rows, height, dtype=torch.float32, device=x.device)
    _launch(x, weight, Around(), tile, parts)
    return parts


def _launch(x: torch.Tensor, weight: torch.Tensor, around: Around, tile: Tile, out: torch.Tensor) -> None:
    """`out` [n, outputs], or in parts [splits, n, outputs]."""
    (rows, width), height = x.shape, out.shape[-1]
    splits = 1 if out.dim() == 2 else out.shape[0]
    inputs = min(tile.inputs * 2 // x.element_size(), max(16, triton.next_power_of_2(width)))
    padded = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
    span = triton.cdiv(triton.cdiv(width, splits), inputs) * inputs
    kernel = _vector_kernel if rows == 1 and splits == 1 else _skinny_kernel
    unused = weight
    if rows:
        kernel[(triton.cdiv(height, tile.outputs), triton.cdiv(rows, padded), splits)](
            x, weight, unused if around.norm is None else around.norm, unused if around.bias is None else around.bias, out,
            rows, width, height, span, x.stride(0), around.eps,
            NORMS=around.norm is not None, BIAS=around.bias is not None, ADDS=around.residual is not None, SILU=around.silu_mul,
            EVEN=width % inputs == 0, ROWS=padded, OUTPUTS=tile.outputs, INPUTS=inputs, STAGES=tile.num_stages,
            num_warps=tile.num_warps, **dependent_launch(),
        )  # fmt: skip


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

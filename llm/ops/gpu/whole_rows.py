# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""y = x W^T for a single row of x by programs that stay, each of which keeps x and takes whole rows of W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs

MULTIPROCESSORS = 132
"""Of an H100 and an H200."""
HEAD_OUTPUTS = 65_536
"""More outputs than this are a vocabulary."""


@dataclass(frozen=True)
class Around:
    """What is computed with it. At most one of `residual` and `silu_mul`."""

    norm: torch.Tensor | None = None
    """[d] weight of an RMSNorm that x, a single row, passes first."""
    eps: float = 1e-5
    bias: torch.Tensor | None = None
    """[outputs]"""
    residual: torch.Tensor | None = None
    """[1, outputs], the result is added to it in place: a single row's."""
    silu_mul: bool = False
    float32: bool = False
    """Results in float32 whatever x's type is (logits)."""


@triton.jit
def _whole_rows_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, width, height, eps,
    NORMS: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, FULL: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program keeps x (times norm) and takes rows of W as a whole, OUTPUTS at a time, until there are no more.

    So x is read once a program, not once a tile. All the loads that fit in flight are on their way while x is being computed: the
    wait is within the loop, whose loads the compiler moves ahead of it.
    """
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    x = tl.zeros((WIDTH,), dtype=tl.float32)
    scale = 1.0
    first = tl.program_id(0)
    for group in tl.range(first, tl.cdiv(height, OUTPUTS), tl.num_programs(0), num_stages=STAGES):
        outputs = group * OUTPUTS + tl.arange(0, OUTPUTS)
        weights = weight_ptr + tl.minimum(outputs, height - 1).to(tl.int64)[:, None] * width + columns[None, :]
        weight = tl.load(weights, mask=inside[None, :] | FULL, other=0.0)
        if group == first:
            wait_for_inputs(EARLY)
            x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if NORMS:
                scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
                x *= tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(weight.to(tl.float32) * x[None, :], axis=1) * scale
        real = outputs < height
        if BIAS:
            total += tl.load(bias_ptr + outputs, mask=real, other=0.0).to(tl.float32)
        if ADDS:
            total += tl.load(out_ptr + outputs, mask=real, other=0.0).to(tl.float32)
        tl.store(out_ptr + outputs, total.to(out_ptr.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class WholeRows:
    """How many rows of W a program takes at a time, its warps and loads in flight, and programs for each multiprocessor."""

    outputs: int
    num_warps: int
    num_stages: int
    programs: int


def choose_whole_rows(width: int, height: int, element_size: int) -> WholeRows | None:
    """For one row of x without SiLU; None: tiles are better, or not known to be worse. Measured as `choose_tile`'s, on both.

    By the bytes of a row of W, for what is in flight must fit the shared memory: 48 KB a program, or 128.
    """
    num_bytes = triton.next_power_of_2(width) * element_size
    if height > HEAD_OUTPUTS or not 8192 <= num_bytes <= 32_768:
        return None
    return WholeRows(2, num_warps=8, num_stages=4, programs=4) if num_bytes == 8192 else WholeRows(2, 16, 3, programs=1)


def take_whole_rows(x: torch.Tensor, weight: torch.Tensor, around: Around, whole: WholeRows, out: torch.Tensor) -> None:
    """x [1, d] without SiLU; `out` [1, outputs] is the residual, if there is one."""
    width, height, unused = x.shape[1], out.shape[1], weight
    padded = triton.next_power_of_2(width)
    _whole_rows_kernel[(min(MULTIPROCESSORS * whole.programs, triton.cdiv(height, whole.outputs)),)](
        x, weight, unused if around.norm is None else around.norm, unused if around.bias is None else around.bias, out,
        width, height, around.eps,
        NORMS=around.norm is not None, BIAS=around.bias is not None, ADDS=around.residual is not None, FULL=padded == width,
        OUTPUTS=whole.outputs, WIDTH=padded, STAGES=whole.num_stages, num_warps=whole.num_warps, **dependent_launch(),
    )  # fmt: skip

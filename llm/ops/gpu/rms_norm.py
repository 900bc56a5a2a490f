# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""y = x / sqrt(mean(x^2) + eps) * weight, after x += delta if there is one, in one pass over memory.

References: llm.ops.rms_norm. Sums are float32; x + delta is rounded to x's type before it is normalised, as it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    delta_stride,
    width,
    eps,
    part_stride,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ADDS: how many parts delta has."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, ADDS):
            delta += tl.load(delta_ptr + part * part_stride + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(out_ptr + row * width + columns, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm_kernel(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    stride,
    num_query_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < HEAD_DIM
    place = qkv_ptr + row * stride + head * HEAD_DIM + columns
    wait_for_inputs(EARLY)
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    norm_ptr = query_norm_ptr if head < num_query_heads else key_norm_ptr
    weight = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
    tl.store(place, (x * scale * weight).to(qkv_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, d], rows contiguous; weight [d] -> [n, d] of x's type."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out)
    return out


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x += delta in place, then rms_norm(x): [n, d], [n, d] or its parts [s, n, d], [d] -> [n, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, delta, weight, eps, out)
    return out


def head_norm(qkv: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float, num_kv_heads: int) -> None:
    """Normalises each head of q and k in place (Qwen3): qkv [n, (h + 2 kv) d], norms [d]."""
    rows, head_dim = qkv.shape[0], query_norm.shape[0]
    num_query_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    grid = (rows, num_query_heads + num_kv_heads)
    block = triton.next_power_of_2(head_dim)
    _head_norm_kernel[grid](
        qkv,
        query_norm,
        key_norm,
        qkv.stride(0),
        num_query_heads,
        eps,
        HEAD_DIM=head_dim,
        BLOCK=block,
        num_warps=1,
        **dependent_launch(),
    )


def _launch(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    other = x if delta is None else delta
    warps = max(1, min(16, block // 512))
    _rms_norm_kernel[(rows,)](
        x,
        other,
        weight,
        out,
        x.stride(0),
        other.stride(-2),
        width,
        eps,
        other.stride(0),
        ADDS=0 if delta is None else 1 if delta.dim() == 2 else delta.shape[0],
        BLOCK=block,
        num_warps=warps,
        **dependent_launch(),
    )

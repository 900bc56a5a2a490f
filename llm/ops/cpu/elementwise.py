# mypy: allow-untyped-decorators
# ruff: noqa: PLR0917
"""RMSNorm, SiLU, RoPE with the KV write, embedding. Each also exists in one thread, for batches too small to share out."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np

from llm.ops.cpu.intrinsics import exp, narrow, widen

_ZERO, _ONE = np.float32(0), np.float32(1)


def _both(function: Callable[..., None]) -> tuple[Any, Any]:
    """In one thread, and in all. Numba's cache tells functions apart by name but not by options, so one gets another name."""
    alone = FunctionType(function.__code__, function.__globals__, function.__name__)
    alone.__qualname__ = function.__qualname__ + "_serial"
    return numba.njit(fastmath=True, error_model="numpy", cache=True)(alone), numba.njit(parallel=True, fastmath=True, cache=True)(
        function
    )


@numba.njit(fastmath=True, error_model="numpy", inline="always")
def _normalise(source: Any, weight: Any, eps: Any, out: Any, row: Any) -> None:
    total = _ZERO
    for index in range(source.shape[1]):
        total += source[row, index] * source[row, index]
    factor = _ONE / np.sqrt(total / np.float32(source.shape[1]) + eps)
    for index in range(source.shape[1]):
        out[row, index] = source[row, index] * factor * weight[index]


def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for row in numba.prange(x.shape[0]):
        _normalise(x, weight, eps, out, row)


def _add_rms_norm(x: Any, delta: Any, weight: Any, eps: Any, out: Any) -> None:
    for row in numba.prange(x.shape[0]):
        for index in range(x.shape[1]):
            x[row, index] += delta[row, index]
        _normalise(x, weight, eps, out, row)


def _silu_mul(gate_up: Any, out: Any) -> None:
    size = out.shape[1]
    for row in numba.prange(out.shape[0]):
        for index in range(size):
            gate = gate_up[row, index]
            out[row, index] = gate / (_ONE + exp(-gate)) * gate_up[row, size + index]


def _rotate_and_write(qkv: Any, cos: Any, sin: Any, blocks: Any, offsets: Any, pool: Any, layer: int) -> None:
    num_kv_heads, size = pool.shape[3], pool.shape[5]
    num_turned = qkv.shape[1] // size - num_kv_heads
    half = size // 2
    for row in numba.prange(qkv.shape[0]):
        block, offset = blocks[row], offsets[row]
        for head in range(num_turned):
            base = head * size
            for index in range(half):
                first, second = qkv[row, base + index], qkv[row, base + half + index]
                qkv[row, base + index] = first * cos[row, index] - second * sin[row, index]
                qkv[row, base + half + index] = second * cos[row, index] + first * sin[row, index]
        for head in range(num_kv_heads):
            base = (num_turned - num_kv_heads + head) * size
            for index in range(size):
                pool[block, layer, 0, head, offset, index] = narrow(qkv[row, base + index], pool)
                pool[block, layer, 1, head, offset, index] = narrow(qkv[row, base + num_kv_heads * size + index], pool)


def _embed(table: Any, token_ids: Any, out: Any) -> None:
    for row in numba.prange(out.shape[0]):
        token = token_ids[row]
        for index in range(out.shape[1]):
            out[row, index] = widen(table[token, index])


rms_norm = _both(_rms_norm)
add_rms_norm = _both(_add_rms_norm)
silu_mul = _both(_silu_mul)
rotate_and_write = _both(_rotate_and_write)
embed = _both(_embed)

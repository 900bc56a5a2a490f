# mypy: allow-untyped-decorators
"""y = x W^T for few rows of x: reads the weights once, in float32 or bfloat16, and sums in float32."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llm.ops.cpu.intrinsics import widen

_ZERO = np.float32(0)
_PANEL = 48
"""Weight rows that stay in the second-level cache while all rows of x pass."""


@numba.njit(parallel=True, fastmath=True, cache=True)
def multiply_one(x: Any, weight: Any, out: Any, parts: int) -> None:
    """x [1, in], weight [out, in], out [1, out]. One sequential stream a thread: bound by memory alone."""
    num_rows, depth = weight.shape
    for part in numba.prange(parts):
        for row in range(part * num_rows // parts, (part + 1) * num_rows // parts):
            total = _ZERO
            for index in range(depth):
                total += widen(weight[row, index]) * x[0, index]
            out[0, row] = total


@numba.njit(parallel=True, fastmath=True, cache=True)
def multiply_two(x: Any, weight: Any, out: Any, parts: int) -> None:
    """x [2, in], weight [out, in], out [2, out]."""
    num_rows, depth = weight.shape
    for part in numba.prange(parts):
        for row in range(part * num_rows // parts, (part + 1) * num_rows // parts):
            a = b = _ZERO
            for index in range(depth):
                value = widen(weight[row, index])
                a += value * x[0, index]
                b += value * x[1, index]
            out[0, row] = a
            out[1, row] = b


@numba.njit(parallel=True, fastmath=True, cache=True)
def multiply_some(x: Any, weight: Any, out: Any, parts: int) -> None:
    """x [n, in], weight [out, in], out [n, out]: 3 weight rows by 4 rows of x, twelve sums in registers.

    At the edges the last row is computed again, which is cheaper than a second kernel.
    """
    num_rows, depth = weight.shape
    last = x.shape[0] - 1
    for part in numba.prange(parts):
        end = (part + 1) * num_rows // parts
        for panel in range(part * num_rows // parts, end, _PANEL):
            top = min(panel + _PANEL, end)
            for r in range(0, last + 1, 4):
                s, t, u = min(r + 1, last), min(r + 2, last), min(r + 3, last)
                for i in range(panel, top, 3):
                    j, k = min(i + 1, top - 1), min(i + 2, top - 1)
                    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = _ZERO
                    for index in range(depth):
                        a, b, c = widen(weight[i, index]), widen(weight[j, index]), widen(weight[k, index])
                        value = x[r, index]
                        a0 += a * value
                        b0 += b * value
                        c0 += c * value
                        value = x[s, index]
                        a1 += a * value
                        b1 += b * value
                        c1 += c * value
                        value = x[t, index]
                        a2 += a * value
                        b2 += b * value
                        c2 += c * value
                        value = x[u, index]
                        a3 += a * value
                        b3 += b * value
                        c3 += c * value
                    out[r, i], out[r, j], out[r, k] = a0, b0, c0
                    out[s, i], out[s, j], out[s, k] = a1, b1, c1
                    out[t, i], out[t, j], out[t, k] = a2, b2, c2
                    out[u, i], out[u, j], out[u, k] = a3, b3, c3

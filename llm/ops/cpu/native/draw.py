"""Weights of tokens from their logits, by the native library."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

GROUP = 256
"""As in draw.h."""


def weigh(
    library: ctypes.CDLL, values: npt.NDArray[np.float32], temperature: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """exp((values - their highest) / temperature), 0 where that is no normal float, and the sum of each GROUP of these."""
    assert values.flags.c_contiguous and values.dtype == np.float32, "one row of logits"
    weights, sums = np.empty_like(values), np.empty(-(-len(values) // GROUP))
    library.tandem_weigh(values.ctypes.data, len(values), 1.0 / temperature, weights.ctypes.data, sums.ctypes.data)
    return weights, sums

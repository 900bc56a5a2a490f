"""Weight matrices in INT8 and INT4, in the order in which the integer products read them. Plain arrays: to store, map and share.

The layout is that of product_integer.h, and the same for every instruction set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

BLOCK_OUTPUTS = 16
QUAD = 4
GROUP = 32
"""Inputs that share a scale."""
_MOST_INT8, _MOST_NIBBLE = 127, 15
_ZERO_INT8 = 128
"""Is added to INT8's integers."""
_LARGEST_DEPTH = 65_536
"""Beyond what any model has; sizes stay within 32 bits."""

Array = npt.NDArray[Any]
IntegerFormat = Literal["int8", "int4"]


def refusal(format: IntegerFormat, shape: tuple[int, int]) -> str | None:
    """Why a matrix [out, in] cannot have the format, for people; None if it can."""
    _, depth = shape
    if format == "int4" and depth % GROUP:
        return f"int4 needs inputs in groups of {GROUP}, and this matrix has {depth}"
    return f"a row of {depth} inputs is too long" if depth > _LARGEST_DEPTH else None


@dataclass(frozen=True)
class _Packed:
    """A matrix [out, in] and the arrays that stand for it."""

    shape: tuple[int, int]
    values: Array
    scales: Array

    def arrays(self) -> dict[str, Array]:
        return {"values": self.values, "scales": self.scales}

    @classmethod
    def from_arrays(cls, shape: tuple[int, int], arrays: Mapping[str, Array]) -> Self:
        return cls(shape, arrays["values"], arrays["scales"])


class PackedInt8(_Packed):
    """Integers from -127 to 127 times a scale for each output and 32 inputs.

    values: uint8 [blocks, groups, 8, 16, 4], integers + 128, zeros beyond both ends. scales: float16 [blocks, groups, 16].
    """

    def widened(self) -> Array:
        """The float32 matrix that these numbers stand for."""
        blocks, groups = self.values.shape[:2]
        integers = (
            self.values.transpose(0, 3, 1, 2, 4).reshape(blocks, BLOCK_OUTPUTS, groups, GROUP).astype(np.float32) - _ZERO_INT8
        )
        full = integers * self.scales.astype(np.float32).transpose(0, 2, 1)[..., None]
        return full.reshape(blocks * BLOCK_OUTPUTS, -1)[: self.shape[0], : self.shape[1]]


class PackedInt4(_Packed):
    """Integers from 0 to 15, times a scale, plus an offset, for each output and 32 inputs.

    values: uint8 [blocks, groups, 4, 16, 4], the low nibbles are four of an output's inputs, the high ones the next four. scales:
    float16 [blocks, groups, 2, 16], scales, then offsets.
    """

    def widened(self) -> Array:
        """The float32 matrix that these numbers stand for."""
        blocks, groups = self.values.shape[:2]
        pair = np.stack([self.values & 15, self.values >> 4], axis=3).astype(np.float32)  # block, group, pair, half, output, four
        nibbles = pair.transpose(0, 4, 1, 2, 3, 5).reshape(blocks, BLOCK_OUTPUTS, groups, GROUP)
        scale, offset = (self.scales[:, :, which].astype(np.float32).transpose(0, 2, 1)[..., None] for which in (0, 1))
        return (nibbles * scale + offset).reshape(blocks * BLOCK_OUTPUTS, -1)[: self.shape[0]]


def int8_shapes(shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and types of the arrays of a matrix that is not packed yet."""
    blocks, groups = -(-shape[0] // BLOCK_OUTPUTS), -(-shape[1] // GROUP)
    return {
        "values": ((blocks, groups, 8, BLOCK_OUTPUTS, QUAD), np.uint8),
        "scales": ((blocks, groups, BLOCK_OUTPUTS), np.float16),
    }


def int4_shapes(shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and types of the arrays of a matrix that is not packed yet."""
    blocks, groups = -(-shape[0] // BLOCK_OUTPUTS), shape[1] // GROUP
    return {
        "values": ((blocks, groups, 4, BLOCK_OUTPUTS, QUAD), np.uint8),
        "scales": ((blocks, groups, 2, BLOCK_OUTPUTS), np.float16),
    }


def pack_int8(weight: Array) -> PackedInt8:
    """Rounds each group of 32 to multiples of its largest magnitude over 127. weight [out, in] float32, finite."""
    groups = _padded(weight, 1, GROUP).reshape(weight.shape[0], -1, GROUP)
    scales = (np.abs(groups).max(axis=2) / _MOST_INT8).astype(np.float16)
    integers = np.clip(np.rint(groups / _divisors(scales)), -_MOST_INT8, _MOST_INT8).astype(np.int8)
    return pack_bytes(integers.reshape(weight.shape[0], -1)[:, : weight.shape[1]], scales)


def pack_bytes(integers: Array, scales: Array) -> PackedInt8:
    """From integers that a file holds: integers [out, in] int8, scales [out, groups of 32] float16."""
    shape = (integers.shape[0], integers.shape[1])
    _check("int8", shape)
    full = _padded(integers, BLOCK_OUTPUTS, GROUP).view(np.uint8) ^ _ZERO_INT8
    blocks = full.reshape(-1, BLOCK_OUTPUTS, full.shape[1] // GROUP, GROUP // QUAD, QUAD).transpose(0, 2, 3, 1, 4)
    ordered = _padded(scales.astype(np.float16), BLOCK_OUTPUTS, 1).reshape(-1, BLOCK_OUTPUTS, scales.shape[1]).transpose(0, 2, 1)
    return PackedInt8(shape, aligned(blocks), np.ascontiguousarray(ordered))


def pack_int4(weight: Array) -> PackedInt4:
    """Spreads each group of 32 evenly from its least value to its largest, sixteen steps. weight [out, in] float32, finite."""
    _check("int4", (weight.shape[0], weight.shape[1]))
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    least = groups.min(axis=2).astype(np.float16)
    scales = ((groups.max(axis=2) - least.astype(np.float32)) / _MOST_NIBBLE).astype(np.float16)
    steps = (groups - least.astype(np.float32)[..., None]) / _divisors(scales)
    nibbles = np.clip(np.rint(steps), 0, _MOST_NIBBLE).astype(np.uint8)
    return pack_nibbles(nibbles.reshape(weight.shape), scales, least)


def pack_nibbles(nibbles: Array, scales: Array, offsets: Array) -> PackedInt4:
    """From integers that a file holds: nibbles [out, in] uint8 up to 15, scales and offsets [out, in / 32] float16."""
    shape = (nibbles.shape[0], nibbles.shape[1])
    _check("int4", shape)
    full = _padded(nibbles, BLOCK_OUTPUTS, GROUP)
    pairs = full.reshape(-1, BLOCK_OUTPUTS, shape[1] // GROUP, GROUP // 8, 2, QUAD).transpose(4, 0, 2, 3, 1, 5)
    values = aligned(pairs[0] | pairs[1] << 4)
    both = np.stack([_padded(item.astype(np.float16), BLOCK_OUTPUTS, 1) for item in (scales, offsets)])
    ordered = both.reshape(2, -1, BLOCK_OUTPUTS, shape[1] // GROUP).transpose(1, 3, 0, 2)
    return PackedInt4(shape, values, np.ascontiguousarray(ordered))


def aligned(array: Array) -> Array:
    """A contiguous copy that begins at a cache line, as the products need it of `values`."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _check(format: IntegerFormat, shape: tuple[int, int]) -> None:
    reason = refusal(format, shape)
    if reason:
        raise ValueError(reason)


def _divisors(scales: Array) -> Array:
    wide = scales.astype(np.float32)[..., None]
    return np.where(wide > 0, wide, np.float32(1))


def _padded(array: Array, rows: int, columns: int) -> Array:
    return np.pad(array, ((0, -array.shape[0] % rows), (0, -array.shape[1] % columns)))

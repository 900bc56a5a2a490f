"""One matrix's product alone, on the calling thread: for tests and measurements. Models multiply within their step."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.ops.cpu.native import structures
from llm.ops.cpu.packed import PackedInt4, PackedInt8, aligned

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.uint8]


class Product:
    """y = x W^T."""

    def __init__(self, weight: PackedInt8 | PackedInt4 | Floats, library: ctypes.CDLL, format: str | None = None) -> None:
        """`format`: another than the weight's own that takes the same arrays, as w4a8 takes int4's."""
        self._library, self._kept = library, weight
        self.outputs, self.depth = weight.shape
        number = _format(weight) if format is None else structures.FORMATS[format]
        self._matrix = structures.Matrix(number, self.outputs, self.depth, **_pointers(weight))

    def prepare(self, x: Floats) -> Rows:
        """Rows ready to be multiplied, in this library's own form. x [n, depth]"""
        assert x.flags.c_contiguous and x.dtype == np.float32 and x.shape[1:] == (self.depth,)
        rows = aligned(np.zeros((len(x), self._library.tandem_row_bytes(ctypes.byref(self._matrix))), np.uint8))
        self.prepare_into(x, rows)
        return rows

    def prepare_into(self, x: Floats, rows: Rows) -> None:
        self._library.tandem_prepare(ctypes.byref(self._matrix), x.ctypes.data, len(x), rows.ctypes.data)

    def multiply_into(self, rows: Rows, out: Floats, first: int = 0, last: int | None = None) -> None:
        """out [n, outputs]; of it outputs `first`, a multiple of 16, to `last`, another or the end, are written."""
        end = self.outputs if last is None else last
        result = self._library.tandem_multiply(ctypes.byref(self._matrix), rows.ctypes.data, len(rows), out.ctypes.data, first, end)
        if result:
            raise MemoryError("no memory for a product")

    def __call__(self, x: Floats) -> Floats:
        out = np.empty((len(x), self.outputs), np.float32)
        self.multiply_into(self.prepare(x), out)
        return out


def _format(weight: PackedInt8 | PackedInt4 | Floats) -> int:
    kinds: dict[type, str] = {PackedInt8: "int8", PackedInt4: "int4"}
    return structures.FORMATS[kinds.get(type(weight), "float32")]


def _pointers(weight: PackedInt8 | PackedInt4 | Floats) -> dict[str, Any]:
    if isinstance(weight, np.ndarray):
        return {"values": weight.ctypes.data}
    return {name: array.ctypes.data for name, array in weight.arrays().items()}

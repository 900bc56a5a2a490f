# mypy: allow-untyped-decorators
# ruff: noqa: PLR0917
"""What numba's Python cannot say: bfloat16, prefetching, and two register tiles that its vectoriser does not find.

Arrays must be C-contiguous; counts that are said to be multiples of 8 or 16 are not checked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def _separate_caches() -> None:
    """Numba notices a change of a kernel's own file only, not of the files that it uses, so each version has its own folder.

    All kernels' modules import this one before they compile anything.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    if numba.config.CACHE_DIR:
        numba.config.CACHE_DIR = str(Path(numba.config.CACHE_DIR) / hashlib.blake2b(sources, digest_size=8).hexdigest())


_separate_caches()

_BITS, _INDEX, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES = 8
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_HALVES, _WORDS = ir.VectorType(ir.IntType(16), _LANES), ir.VectorType(_BITS, _LANES)
_FAST = ("fast",)
_TILE_ROWS, _TILE_COLUMNS = 6, 16


@intrinsic
def widen(_context: Any, value: Any) -> Any:
    """float32 from a bfloat16's bits (uint16); a float32 stays as it is."""

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _BITS), _BITS(16)), _FLOAT)

    return types.float32(value), emit


@intrinsic
def narrow(_context: Any, value: Any, like: Any) -> Any:
    """`value` as an element of the array `like`: float32, or bfloat16's bits rounded to nearest even."""

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[1].dtype == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _BITS)
        odd = builder.and_(builder.lshr(bits, _BITS(16)), _BITS(1))
        rounded = builder.add(bits, builder.add(odd, _BITS(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _BITS(16)), ir.IntType(16))

    return like.dtype(value, like), emit


@intrinsic
def _power_of_two(_context: Any, exponent: Any) -> Any:
    """2 ** exponent for whole float32 exponents from -126 to 127."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], _BITS), _BITS(127))
        return builder.bitcast(builder.shl(biased, _BITS(23)), _FLOAT)

    return types.float32(exponent), emit


_F = np.float32


@numba.njit(inline="always", error_model="numpy")
def exp(x: Any) -> Any:
    """exp in float32, relative error below 4e-7, clamped to what float32 holds; unlike math.exp it vectorises.

    Range reduction by ln 2 in two parts and a polynomial of degree 7. Source: Moshier, Cephes library, expf.
    """
    x = min(max(x, _F(-87.0)), _F(88.0))
    whole = np.floor(x * _F(1.4426950408889634) + _F(0.5))
    rest = x - whole * _F(0.693359375) + whole * _F(2.12194440e-4)
    series = _F(1.9875691500e-4)
    series = series * rest + _F(1.3981999507e-3)
    series = series * rest + _F(8.3334519073e-3)
    series = series * rest + _F(4.1665795894e-2)
    series = series * rest + _F(1.6666665459e-1)
    series = series * rest + _F(5.0000001201e-1)
    return (series * rest * rest + rest + _F(1.0)) * _power_of_two(whole)


@intrinsic
def prefetch(_context: Any, array: Any, num_bytes: Any) -> Any:
    """Asks for the array's first bytes; hides the walk of page tables, which the hardware does not do ahead."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        base = builder.bitcast(make_array(signature.args[0])(context, builder, arguments[0]).data, pointer)
        kind = ir.FunctionType(ir.VoidType(), [pointer, _BITS, _BITS, _BITS])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        with cgutils.for_range_slice(builder, _INDEX(0), arguments[1], _INDEX(64)) as (offset, _):
            builder.call(function, [builder.gep(base, [offset]), _BITS(0), _BITS(3), _BITS(1)])
        return context.get_dummy_value()

    return types.none(array, types.int64), emit


def _load_vector(builder: Any, pointer: Any, is_bfloat16: bool) -> Any:
    if not is_bfloat16:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    raw = builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(raw, _WORDS), ir.Constant(_WORDS, [16] * _LANES)), _VECTOR)


def _splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, _BITS(0)), empty, ir.Constant(_WORDS, [0] * _LANES))


def _multiply_add(builder: Any, x: Any, y: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(x, y, flags=_FAST), flags=_FAST)


@intrinsic
def accumulate(_context: Any, sums: Any, values: Any, rows: Any, weights: Any) -> Any:
    """sums[h] += weights[4 h + i] * values[rows[i]] over i < 4, for each h < 3.

    sums [3, d] float32, values [n, d] float32 or bfloat16, d a multiple of 8; tuples of 4 int64 and 12 float32.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = make_array(signature.args[0])(context, builder, arguments[0])
        source = make_array(signature.args[1])(context, builder, arguments[1])
        width = cgutils.unpack_tuple(builder, target.shape, 2)[1]
        is_bfloat16 = signature.args[1].dtype == types.uint16
        factors = [_splat(builder, weight) for weight in cgutils.unpack_tuple(builder, arguments[3], 12)]
        starts = [builder.gep(source.data, [builder.mul(row, width)]) for row in cgutils.unpack_tuple(builder, arguments[2], 4)]
        with cgutils.for_range_slice(builder, _INDEX(0), width, _INDEX(_LANES)) as (column, _):
            loaded = [_load_vector(builder, builder.gep(start, [column]), is_bfloat16) for start in starts]
            for head in range(3):
                place = builder.gep(target.data, [builder.add(builder.mul(_INDEX(head), width), column)])
                place = builder.bitcast(place, _VECTOR.as_pointer())
                total = builder.load(place, align=4)
                for index, vector in enumerate(loaded):
                    total = _multiply_add(builder, factors[4 * head + index], vector, total)
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.none(sums, values, types.UniTuple(types.int64, 4), types.UniTuple(types.float32, 12)), emit


@intrinsic
def multiply_tile(_context: Any, out: Any, left: Any, right: Any, row: Any, column: Any, depth: Any) -> Any:
    """out[row : row + 6, column : column + 16] = left[row : row + 6, :depth] @ right[:depth, column : column + 16].

    Float32. Twelve sums stay in registers: each step loads two vectors and six scalars for twelve multiply-adds.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [make_array(kind)(context, builder, value) for kind, value in zip(signature.args[:3], arguments[:3], strict=True)]
        widths = [cgutils.unpack_tuple(builder, array.shape, 2)[1] for array in arrays]
        top, first, count = arguments[3:]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(2 * _TILE_ROWS)]
        for place in sums:
            builder.store(ir.Constant(_VECTOR, None), place)
        lines = [builder.add(top, _INDEX(index)) for index in range(_TILE_ROWS)]
        lefts = [builder.gep(arrays[1].data, [builder.mul(line, widths[1])]) for line in lines]
        with cgutils.for_range(builder, count) as loop:
            base = builder.gep(arrays[2].data, [builder.add(builder.mul(loop.index, widths[2]), first)])
            vectors = [_load_vector(builder, builder.gep(base, [_INDEX(half * _LANES)]), False) for half in range(2)]
            for index, start in enumerate(lefts):
                factor = _splat(builder, builder.load(builder.gep(start, [loop.index])))
                for half, vector in enumerate(vectors):
                    place = sums[2 * index + half]
                    builder.store(_multiply_add(builder, factor, vector, builder.load(place)), place)
        for index, line in enumerate(lines):
            start = builder.gep(arrays[0].data, [builder.add(builder.mul(line, widths[0]), first)])
            for half in range(2):
                place = builder.bitcast(builder.gep(start, [_INDEX(half * _LANES)]), _VECTOR.as_pointer())
                builder.store(builder.load(sums[2 * index + half]), place, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.none(out, left, right, index, index, index), emit

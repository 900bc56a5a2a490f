"""INT8 and INT4 products: exact where float32 is, equal to the bit in every batch and instruction set, unharmed by rubbish."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from llm.ops.cpu.native import library
from llm.ops.cpu.native.product import Product
from llm.ops.cpu.packed import GROUP, PackedInt4, PackedInt8, pack_bytes, pack_int4, pack_int8, pack_nibbles
from tandem.models import cache_directory

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

SETS = library.supported_sets()
MOST = 32767
PACKERS: dict[str, Callable[[np.ndarray], PackedInt8 | PackedInt4]] = {"int8": pack_int8, "int4": pack_int4}
sizes, seeds = st.tuples(st.integers(1, 19), st.integers(1, 70), st.integers(1, 150)), st.integers(0, 2**32 - 1)


def product(weight: Any, name: str = SETS[-1]) -> Product:
    return Product(weight, library.load(cache_directory(), name))


def fitting(format: str, depth: int) -> int:
    return -(-depth // GROUP) * GROUP if format == "int4" else depth


def whole_rows(random: np.random.Generator, count: int, depth: int) -> np.ndarray:
    """Whole numbers, the largest that a row's 16 bits hold among each group's: their scale is exactly 1."""
    x = random.integers(-127, 128, (count, depth)).astype(np.float32)
    x[:, ::GROUP] = MOST * random.choice([-1, 1], (count, -(-depth // GROUP)))
    return x


def quantised(x: np.ndarray) -> np.ndarray:
    """What the products make of x, in float64."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    most = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(most < 1e-30, np.float32(0), np.float32(MOST) / most)
    scale = np.where(most < 1e-30, np.float32(0), most / np.float32(MOST)).astype(np.float64)
    return (np.rint(groups * inverse).astype(np.float64) * scale).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", SETS)
@settings(deadline=None, max_examples=40)
@given(sizes, seeds)
def test_whole_numbers_are_multiplied_exactly(name: str, size: tuple[int, int, int], seed: int) -> None:
    rows, outputs, depth = size
    random = np.random.default_rng(seed)
    x, integers = whole_rows(random, rows, depth), random.integers(-128, 128, (outputs, depth)).astype(np.int8)
    integers[:, ::GROUP] //= 8  # so that float32 holds all sums
    packed = pack_bytes(integers, np.ones((outputs, -(-depth // GROUP)), np.float16))
    assert np.array_equal(product(packed, name)(x), x @ integers.T.astype(np.float32))
    depth = fitting("int4", depth)
    x, nibbles = whole_rows(random, rows, depth), random.integers(0, 16, (outputs, depth)).astype(np.uint8)
    scales, offsets = (random.integers(-8, 9, (outputs, depth // GROUP)).astype(np.float16) for _ in range(2))
    weight = nibbles * np.repeat(scales, GROUP, axis=1).astype(np.float32) + np.repeat(offsets, GROUP, axis=1)
    assert np.array_equal(product(pack_nibbles(nibbles, scales, offsets), name)(x), x @ weight.T.astype(np.float32))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("extreme", [(MOST, 127), (MOST, -128), (-MOST, -128), (-MOST, 127)])
def test_the_largest_numbers_do_not_overflow(name: str, extreme: tuple[int, int]) -> None:
    x = np.full((5, 64), extreme[0], np.float32)
    for bits in (8, 4):
        if bits == 8:
            packed: Any = pack_bytes(np.full((20, 64), extreme[1], np.int8), np.ones((20, 2), np.float16))
        else:
            packed = pack_nibbles(np.full((20, 64), 15, np.uint8), np.ones((20, 2), np.float16), np.zeros((20, 2), np.float16))
        assert np.array_equal(product(packed, name)(x), x @ packed.widened().T.astype(np.float64))


@pytest.mark.parametrize("format", PACKERS)
@settings(deadline=None, max_examples=25)
@given(sizes, seeds, st.floats(-12, 12))
def test_products_are_those_of_the_quantised_numbers(format: str, size: tuple[int, int, int], seed: int, power: float) -> None:
    rows, outputs, depth = size[0], size[1], fitting(format, size[2])
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, depth)) * 10**power).astype(np.float32)
    packed = PACKERS[format](random.standard_normal((outputs, depth)).astype(np.float32))
    exact, weight = quantised(x), packed.widened().astype(np.float64)
    bound = np.abs(exact) @ np.abs(weight).T + 1e-30
    assert (np.abs(product(packed)(x) - exact @ weight.T) <= 3e-6 * bound).all()


@pytest.mark.parametrize("format", PACKERS)
@settings(deadline=None, max_examples=25)
@given(sizes, seeds)
def test_a_row_is_the_same_in_every_batch_and_instruction_set(format: str, size: tuple[int, int, int], seed: int) -> None:
    rows, outputs, depth = size[0], size[1], fitting(format, size[2])
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, depth)).astype(np.float32)
    packed = PACKERS[format](random.standard_normal((outputs, depth)).astype(np.float32))
    together = product(packed)(x)
    assert all(np.array_equal(product(packed)(x[row : row + 1])[0], together[row]) for row in range(rows))
    assert all(np.array_equal(product(packed, name)(x), together) for name in SETS)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", PACKERS)
@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 48), (32, 70), (64, 70), (48, 48)])
def test_only_the_wanted_outputs_are_written(name: str, format: str, first: int, last: int) -> None:
    random = np.random.default_rng(2)
    x, weight = (random.standard_normal((count, 64)).astype(np.float32) for count in (11, 70))
    each = product(PACKERS[format](weight), name)
    out = np.full((11, 70), 7.0, np.float32)
    each.multiply_into(each.prepare(x), out, first, last)
    assert np.array_equal(out[:, first:last], each(x)[:, first:last])
    assert (out[:, :first] == 7).all() and (out[:, last:] == 7).all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", PACKERS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_only_itself(name: str, format: str, rubbish: float) -> None:
    random = np.random.default_rng(3)
    x, weight = (random.standard_normal((count, 96)).astype(np.float32) for count in (7, 33))
    each = product(PACKERS[format](weight), name)
    clean = each(x)
    x[4, 50] = rubbish
    spoilt = each(x)
    assert np.isnan(spoilt[4]).all()
    assert np.array_equal(np.delete(spoilt, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", PACKERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e36])
def test_rows_of_nothing_and_of_almost_too_much(name: str, format: str, value: float) -> None:
    weight = np.eye(32, 64, dtype=np.float32)
    out = product(PACKERS[format](weight), name)(np.full((3, 64), value, np.float32))
    assert np.allclose(out, value, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", PACKERS)
def test_groups_of_nothing_and_subnormal_ones_lie_beside_others(name: str, format: str) -> None:
    random = np.random.default_rng(4)
    x, weight = (random.standard_normal((count, 128)).astype(np.float32) for count in (9, 33))
    x[:, :GROUP] = 0
    x[::2, GROUP : 2 * GROUP] *= np.float32(1e-39)
    packed = PACKERS[format](weight)
    exact, wide = quantised(x), packed.widened().astype(np.float64)
    assert (np.abs(product(packed, name)(x) - exact @ wide.T) <= 3e-6 * (np.abs(exact) @ np.abs(wide).T)).all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows", [1, 9])
def test_subnormal_scales_of_weights_are_exact(name: str, rows: int) -> None:
    random = np.random.default_rng(5)
    x, least = whole_rows(random, rows, 64), np.full((17, 2), 2.0**-24, np.float16)
    nibbles = random.integers(0, 16, (17, 64)).astype(np.uint8)
    for packed in (pack_bytes(nibbles.astype(np.int8), least), pack_nibbles(nibbles, least, np.zeros((17, 2), np.float16))):
        assert np.array_equal(product(packed, name)(x), x @ (nibbles.T * np.float32(2.0**-24)))

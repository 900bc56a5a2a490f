"""INT4 weights by rows in 8 bits: the same to the bit in every batch and instruction set, and no sum of 16 bits overflows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from llm.ops.cpu.native import library
from llm.ops.cpu.native.product import Product
from llm.ops.cpu.packed import GROUP, PackedInt4, pack_int4, pack_nibbles
from tandem.models import cache_directory

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

SETS = library.supported_sets()
MANY = 9
"""Rows whose weights are mixed; of few the rows are."""
sizes, seeds = st.tuples(st.integers(1, 19), st.integers(1, 70), st.integers(1, 5)), st.integers(0, 2**32 - 1)


def product(weight: Any, name: str = SETS[-1]) -> Product:
    return Product(weight, library.load(cache_directory(), name), "w4a8")


def mixed(values: np.ndarray) -> np.ndarray:
    """H over inputs i, i + 4, ..., i + 28 of each group of 32 in `values`."""
    eights = values.reshape(*values.shape[:-1], -1, 4, 2, 4)  # group, k, half, i
    by_half = np.stack([eights[..., 0, :] + eights[..., 1, :], eights[..., 0, :] - eights[..., 1, :]], axis=-2)
    a, b, c, d = (by_half[..., k, :, :] for k in range(4))
    four = np.stack([a + b + (c + d), a - b + (c - d), a + b - (c + d), a - b - (c - d)], axis=-3)
    return four.reshape(values.shape)


def quantised(x: np.ndarray) -> np.ndarray:
    """What the products make of x, in float64."""
    groups = mixed(x.astype(np.float64)).reshape(len(x), -1, GROUP)
    most = np.abs(groups).max(axis=2, keepdims=True)
    scale = np.where(most < 1e-30, 1.0, most / 127)
    squares = (np.rint(groups / scale) ** 2).reshape(*groups.shape[:2], 8, 2, 2).sum(axis=(2, 4)).max(axis=2)[..., None]
    scale = np.where(squares > 386**2, most / np.floor(127 * 380 / np.sqrt(np.maximum(squares, 1))), scale)
    return mixed((np.rint(groups / scale) * scale).reshape(x.shape)) / 8


def random_case(size: tuple[int, int, int], seed: int) -> tuple[np.ndarray, PackedInt4]:
    rows, outputs, groups = size
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, groups * GROUP)).astype(np.float32)
    x[random.random(x.shape) < 0.03] *= 40
    return x, pack_int4(random.standard_normal((outputs, groups * GROUP)).astype(np.float32))


def test_the_transform_of_these_tests_is_hadamards() -> None:
    eights = np.random.default_rng(1).integers(-9, 9, (3, GROUP)).astype(np.float32)
    by_index = eights.reshape(3, 8, 4)
    assert np.array_equal(mixed(eights).reshape(3, 8, 4)[:, 0], by_index.sum(axis=1))
    assert np.array_equal(mixed(mixed(eights)), 8 * eights)
    assert np.array_equal(np.abs(mixed(np.eye(GROUP))).reshape(GROUP, 8, 4).sum(axis=(1, 2)), np.full(GROUP, 8))


@settings(deadline=None, max_examples=25)
@given(sizes, seeds)
def test_products_are_those_of_the_quantised_numbers(size: tuple[int, int, int], seed: int) -> None:
    x, packed = random_case(size, seed)
    exact, weight = quantised(x), packed.widened().astype(np.float64)
    step = np.abs(mixed(x)).reshape(len(x), -1, GROUP).max(axis=2) / 127
    rounded_otherwise = 0.02 * step.sum(axis=1, keepdims=True) * np.abs(weight).max()  # float32 may round a half the other way
    bound = 3e-6 * np.abs(exact) @ np.abs(weight).T + rounded_otherwise
    differences = np.abs(product(packed)(x) - exact @ weight.T)
    assert np.quantile(differences / bound, 0.9) <= 1
    assert (differences <= 40 * bound).all()


@settings(deadline=None, max_examples=25)
@given(sizes, seeds)
def test_a_row_is_the_same_in_every_batch_and_instruction_set(size: tuple[int, int, int], seed: int) -> None:
    x, packed = random_case(size, seed)
    together = product(packed)(x)
    assert all(np.array_equal(product(packed)(x[row : row + 1])[0], together[row]) for row in range(len(x)))
    assert all(np.array_equal(product(packed, name)(x), together) for name in SETS)


def hardest_rows(seed: int) -> tuple[np.ndarray, PackedInt4]:
    """Rows whose H x has but one magnitude, and weights whose signs are those of x: the largest sums that there are."""
    random = np.random.default_rng(seed)
    q = random.choice([-1.0, 1.0], (MANY, GROUP)).astype(np.float32)
    q[::2] *= random.uniform(0.6, 1.0, (q[::2].shape)).astype(np.float32)
    x = mixed(q) / 8
    nibbles = np.where(np.concatenate([x, -x]) > 0, 15, 0).astype(np.uint8)
    ones, zeros = np.ones((len(nibbles), 1), np.float16), np.zeros((len(nibbles), 1), np.float16)
    return x, pack_nibbles(nibbles, ones, zeros)


@pytest.mark.parametrize("name", SETS)
@settings(deadline=None, max_examples=40)
@given(seeds)
def test_the_largest_sums_do_not_overflow(name: str, seed: int) -> None:
    x, packed = hardest_rows(seed)
    exact = x.astype(np.float64) @ packed.widened().T.astype(np.float64)
    assert np.abs(product(packed, name)(x) - exact).max() <= 0.04 * np.abs(exact).max()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "x", [np.eye(GROUP, dtype=np.float32) * 7, np.ones((MANY, GROUP), np.float32), -np.ones((MANY, GROUP), np.float32)]
)
@pytest.mark.parametrize("nibble", [0, 15])
def test_one_value_alone_and_all_alike(name: str, x: np.ndarray, nibble: int) -> None:
    ones = np.ones((20, 1), np.float16)
    packed = pack_nibbles(np.full((20, GROUP), nibble, np.uint8), ones, -3 * ones)
    expected = x @ packed.widened().T
    assert np.allclose(product(packed, name)(x), expected, rtol=0.01)
    assert np.allclose(product(packed, name)(x[:1]), expected[:1], rtol=0.01)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_only_itself(name: str, rubbish: float) -> None:
    x, packed = random_case((MANY, 33, 3), 3)
    each = product(packed, name)
    clean = each(x)
    x[4, 50] = rubbish
    spoilt = each(x)
    assert np.isnan(spoilt[4]).all() and np.isnan(each(x[4:5])).all()
    assert np.array_equal(np.delete(spoilt, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e36])
def test_rows_of_nothing_and_of_almost_too_much(name: str, value: float) -> None:
    packed = pack_int4(np.eye(32, 64, dtype=np.float32))
    assert np.allclose(product(packed, name)(np.full((MANY, 64), value, np.float32)), value, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 48), (32, 70), (64, 70), (48, 48)])
def test_only_the_wanted_outputs_are_written(name: str, first: int, last: int) -> None:
    x, packed = random_case((MANY, 70, 2), 2)
    each = product(packed, name)
    out = np.full((MANY, 70), 7.0, np.float32)
    each.multiply_into(each.prepare(x), out, first, last)
    assert np.array_equal(out[:, first:last], each(x)[:, first:last])
    assert (out[:, :first] == 7).all() and (out[:, last:] == 7).all()

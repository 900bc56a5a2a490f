"""Packing for the integer products: what the numbers stand for, against plain numpy."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from llm.ops.cpu.packed import (
    GROUP,
    PackedInt4,
    PackedInt8,
    int4_shapes,
    int8_shapes,
    pack_bytes,
    pack_int4,
    pack_int8,
    pack_nibbles,
    refusal,
)

outputs, seeds = st.integers(1, 70), st.integers(0, 2**32 - 1)


def grouped(matrix: np.ndarray) -> np.ndarray:
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % GROUP)))
    return padded.reshape(matrix.shape[0], -1, GROUP)


@settings(deadline=None, max_examples=30)
@given(outputs, st.integers(1, 130), seeds)
@example(44, 1, 463)  # a group of 1.3e-4 alone
def test_int8_is_off_by_half_a_step_at_most(size, depth, seed):
    weight = np.random.default_rng(seed).standard_normal((size, depth)).astype(np.float32)
    packed = pack_int8(weight)
    step = np.abs(grouped(weight)).max(axis=2) / 127
    assert packed.widened().shape == weight.shape
    # The scale is a float16: 2^-11 of itself off at most, or of a tiny group 2^-25, and that 127 times.
    assert (np.abs(grouped(packed.widened() - weight)) <= 0.57 * step[..., None] + 127 * 2**-25).all()


@settings(deadline=None, max_examples=30)
@given(outputs, st.integers(1, 4), seeds)
def test_int4_is_off_by_half_a_step_at_most(size, groups, seed):
    weight = np.random.default_rng(seed).standard_normal((size, groups * GROUP)).astype(np.float32)
    packed = pack_int4(weight)
    step = (grouped(weight).max(axis=2) - grouped(weight).min(axis=2)) / 15
    assert packed.widened().shape == weight.shape
    assert (np.abs(grouped(packed.widened() - weight)) <= 0.52 * step[..., None] + 4e-3).all()


@settings(deadline=None, max_examples=30)
@given(outputs, st.integers(1, 5), seeds)
def test_a_files_own_numbers_stay_what_they_are(size, groups, seed):
    random = np.random.default_rng(seed)
    scales = random.uniform(-0.1, 0.1, (size, groups)).astype(np.float16)
    offsets = random.uniform(-1, 1, (size, groups)).astype(np.float16)
    wide, shift = (np.repeat(item.astype(np.float32), GROUP, axis=1) for item in (scales, offsets))
    nibbles = random.integers(0, 16, (size, groups * GROUP)).astype(np.uint8)
    assert np.array_equal(pack_nibbles(nibbles, scales, offsets).widened(), nibbles * wide + shift)
    integers = random.integers(-127, 128, (size, groups * GROUP)).astype(np.int8)
    assert np.array_equal(pack_bytes(integers, scales).widened(), integers * wide)


@pytest.mark.parametrize("value", [0.0, 1e-30, -2.5])
def test_equal_weights_survive(value):
    weight = np.full((3, 64), value, np.float32)
    for packed in (pack_int8(weight), pack_int4(weight)):
        assert np.allclose(packed.widened(), value, rtol=1e-3, atol=1e-7)


def test_arrays_say_all():
    weight = np.random.default_rng(1).standard_normal((33, 64)).astype(np.float32)
    eight, four = pack_int8(weight), pack_int4(weight)
    for packed, shapes in ((eight, int8_shapes((33, 64))), (four, int4_shapes((33, 64)))):
        assert {name: (array.shape, array.dtype) for name, array in packed.arrays().items()} == {
            name: (shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()
        }
        assert packed.values.ctypes.data % 64 == 0
    assert np.array_equal(PackedInt8.from_arrays((33, 64), eight.arrays()).widened(), eight.widened())
    assert np.array_equal(PackedInt4.from_arrays((33, 64), four.arrays()).widened(), four.widened())


def test_what_cannot_be_packed_is_refused_with_a_reason():
    assert refusal("int8", (7, 33)) is None
    assert refusal("int4", (7, 64)) is None
    assert "groups of 32" in str(refusal("int4", (7, 33)))
    with pytest.raises(ValueError, match="groups of 32"):
        pack_int4(np.zeros((7, 33), np.float32))
    assert "too long" in str(refusal("int8", (1, 1 << 20)))

"""Copies of blocks in host memory: by native code or not, the same bytes and checksums."""

from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from llm.kv.host_copies import Copies, NativeCopies, PlainCopies, copies_of
from llm.ops.cpu.native import library
from tandem.models import cache_directory


@pytest.fixture(scope="module", params=["plain", *library.supported_sets()])
def make(request: pytest.FixtureRequest) -> Callable[[int], Copies]:
    if request.param == "plain":
        return PlainCopies
    native = library.load(cache_directory(), request.param)
    return lambda block_bytes: NativeCopies(native, block_bytes)


def expected(memory: np.ndarray, size: int, ids: np.ndarray) -> list[int]:
    return [xxhash.xxh3_64_intdigest(memory[block * size : (block + 1) * size].tobytes()) for block in ids]


@pytest.mark.parametrize("size", [1024, 2048, 3072, 368_640])
def test_blocks_are_copied_and_summed(make: Callable[[int], Copies], size: int) -> None:
    copies = make(size)
    source = np.random.default_rng(size).integers(0, 256, 7 * size + 100, np.uint8)
    target = np.full(9 * size, 0xAA, np.uint8)
    there, here = np.array([6, 0, 3], np.int32), np.array([8, 1, 0], np.int32)
    source.flags.writeable = False
    sums = copies.copy(source, there, target, here)
    assert sums.tolist() == expected(source, size, there) == copies.checksums(source, there).tolist()
    assert (target.reshape(9, size)[here] == source[: 7 * size].reshape(7, size)[there]).all()
    assert (target.reshape(9, size)[[2, 3, 4, 5, 6, 7]] == 0xAA).all()
    assert copies.checksums(target, here).tolist() == sums.tolist()


@pytest.mark.parametrize("value", [0, 255])
def test_extreme_bytes_and_no_blocks(make: Callable[[int], Copies], value: int) -> None:
    copies, pool, none = make(2048), np.full(4096, value, np.uint8), np.zeros(0, np.int32)
    one = np.array([1], np.int32)
    assert copies.checksums(pool, one).tolist() == expected(pool, 2048, one)
    assert len(copies.copy(pool, none, pool, none)) == len(copies.checksums(pool, none)) == 0


def test_every_bit_counts(make: Callable[[int], Copies]) -> None:
    copies, first = make(2048), np.zeros(1, np.int32)
    pool = np.random.default_rng(1).integers(0, 256, 2048, np.uint8)
    whole = copies.checksums(pool, first)
    for bit in range(0, 2048 * 8, 61):
        pool[bit // 8] ^= 1 << bit % 8
        assert copies.checksums(pool, first) != whole
        pool[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("block", [-1, 2])
def test_blocks_outside_of_a_pool_are_refused(block: int) -> None:
    copies = NativeCopies(library.load(cache_directory()), 1024)
    pool, inside, outside = np.zeros(2048, np.uint8), np.zeros(1, np.int32), np.array([block], np.int32)
    for refused in (
        lambda: copies.checksums(pool, outside),
        lambda: copies.copy(pool, outside, pool, inside),
        lambda: copies.copy(pool, inside, pool, outside),
    ):
        with pytest.raises(AssertionError, match="outside"):
            refused()


def test_blocks_of_other_sizes_are_copied_plainly() -> None:
    library.load(cache_directory())
    assert isinstance(copies_of(1024), NativeCopies)
    assert isinstance(copies_of(1000), PlainCopies)

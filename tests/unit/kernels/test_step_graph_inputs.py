"""Padding of captured batches: what graphs read must give the same numbers as an unpadded batch."""

from array import array
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.batch import SequenceSlice, build_batch
from llm.gpu.decode_batch import decode_arrays, is_decode
from llm.gpu.device_batch import host_arrays
from llm.gpu.step import Staged, StepMemories
from llm.gpu.step_graphs import GraphInputs, bucket_sizes, decode_size, prompt_size, prompt_sizes, size_of
from llm.ops.attention import paged_attention as reference
from tests.fakes.paged_batches import relative_error

paged = pytest.importorskip("decode_svc.kernels.paged_attention")
rope = pytest.importorskip("llm.ops.gpu.rope")


@pytest.mark.parametrize("max_batch", [1, 3, 8, 64, 100, 256])
def test_buckets_ascend_to_the_largest(max_batch):
    sizes = bucket_sizes(max_batch)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == max_batch


def test_padding_at_large_batches_is_small():
    sizes = bucket_sizes(256)
    worst = max((after - before - 1) / (before + 1) for before, after in pairwise(sizes) if before >= 48)
    assert worst < 1 / 4


@pytest.mark.parametrize("max_tokens", [9, 16, 100, 1024, 1152])
def test_prompt_sizes_ascend_to_the_largest(max_tokens):
    sizes = prompt_sizes(max_tokens)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == max_tokens


def test_a_prompt_step_has_room_for_prompts_that_end_within_a_tile():
    size = prompt_size(256, 128, most_logits=100)
    many = [SequenceSlice([1] * 32, 0, range(2)) for _ in range(8)]
    assert size.holds(size_of(host_arrays(build_batch(many, 16), None, 128)))
    assert not size.holds(size_of(host_arrays(build_batch([*many, SequenceSlice([1], 0, [0])], 16), None, 128)))


def test_only_one_token_each_with_logits_is_a_decode_step():
    assert is_decode([SequenceSlice([1], 4, [0]), SequenceSlice([2], 0, [1])])
    assert not is_decode([SequenceSlice([1, 2], 4, [0])])
    assert not is_decode([SequenceSlice([1], 4, [0], "none")])


def decode_slices():
    """One token each, and blocks enough for it, perhaps some to spare."""

    def sliced(start, spare, first):
        blocks = range(first, first + start // 16 + 1 + spare)
        return SequenceSlice([first], start, array("i", blocks) if spare else blocks)

    return st.lists(st.builds(sliced, st.integers(0, 99), st.integers(0, 2), st.integers(0, 50)), min_size=1, max_size=20)


@given(decode_slices(), st.integers(-1, 30) | st.none())
def test_a_decode_step_is_laid_out_as_any_batch(slices, source):
    """But for spare blocks, which are not left out: where a sequence's blocks begin is said."""
    sources = None if source is None else [max(source - index, -1) for index in range(len(slices))]
    expected = host_arrays(build_batch(slices, 16), sources, 16)
    laid = decode_arrays(slices, sources, 16)
    assert list(laid) == list(expected)
    for name in expected:
        assert memoryview(laid[name]).format == expected[name].data.format
        if name not in ("block_ids", "block_starts"):
            assert laid[name].tolist() == expected[name].tolist(), name
    for index, item in enumerate(slices):
        blocks = laid["block_ids"][laid["block_starts"][index] : laid["block_starts"][index + 1]]
        assert blocks.tolist() == list(item.block_ids)


def test_a_decode_step_without_room_in_its_blocks_is_our_bug():
    with pytest.raises(AssertionError, match="without room"):
        decode_arrays([SequenceSlice([7], 16, [5]), SequenceSlice([7], 3, [6])], None, 16)


@pytest.mark.parametrize(("blocks", "fits"), [((2, 1), True), ((2, 2), False)])
def test_a_step_with_more_blocks_than_there_is_memory_for_is_not_replayed(blocks, fits):
    inputs = GraphInputs(decode_size(2), 3, torch.zeros(2, dtype=torch.int32))
    slices = [SequenceSlice([7], 0, range(count)) for count in blocks]
    assert inputs.fits(decode_arrays(slices, None, 16)) == fits


@pytest.mark.parametrize("at_once", [False, True])
def test_a_padded_batch_attends_and_writes_like_its_rows(device, at_once):
    pool = torch.randn(9, 1, 2, 2, 16, 16, device=device)
    inputs = GraphInputs(decode_size(8), 32, torch.zeros(8, dtype=torch.int32, device=device))
    staged = inputs.stage()
    for starts, size in (([20, 0, 47], 4), ([5], 8)):
        slices = [SequenceSlice([7], start, [3 * index, 3 * index + 1, 3 * index + 2]) for index, start in enumerate(starts)]
        batch = build_batch(slices, 16)
        arrays = host_arrays(batch, None, 16)
        assert inputs.fits(arrays)
        inputs.upload(arrays, staged)
        padded = inputs.batch(decode_size(size))
        qkv = torch.randn(size, 8 * 16, device=device)
        expected_pool = pool.clone()
        angles = rope.Angles(torch.ones(64, 8, device=device), torch.zeros(64, 8, device=device), padded.on_device["positions"])
        places = rope.KvPlaces(padded.on_device["row_blocks"], padded.on_device["row_offsets"])
        if at_once:
            out = paged.PagedAttention().turn_and_attend(qkv, angles, padded.tiles, pool, 0)
        else:
            rope.rotate_and_write(qkv, angles, places, pool, 0)
            out = paged.PagedAttention()(qkv, padded.tiles, pool, 0)
        for row, start in enumerate(starts):
            block, offset = 3 * row + start // 16, start % 16
            expected_pool[block, 0, 0, :, offset] = qkv[row, 4 * 16 : 6 * 16].view(2, 16)
            expected_pool[block, 0, 1, :, offset] = qkv[row, 6 * 16 :].view(2, 16)
        assert torch.equal(pool, expected_pool)
        assert not out[len(starts) :].any()
        assert relative_error(out[: len(starts)], reference(qkv[: len(starts)], batch, pool, 0)) < 1e-5


@pytest.mark.parametrize("count", [1, 7, 256, 257, 300])
def test_staged_values_arrive(count, device):
    onto = torch.zeros(300, dtype=torch.int32, device=device)
    staged = Staged(onto)
    staged.values[:count] = range(1, count + 1)
    staged.copy(count)
    assert onto[:count].tolist() == list(range(1, count + 1))


def test_memory_of_a_step_is_used_again_once_its_tokens_are_read(device):
    drawn = torch.tensor([5, 6, 7], dtype=torch.int32, device=device)
    memories = StepMemories(drawn)
    first = memories.take()
    step = first.fetch(2)
    second = memories.take()
    assert second is not first
    drawn += 10
    later = second.fetch(3)
    assert step.token_ids() == [5, 6]
    assert memories.take() is first
    assert later.token_ids() == [15, 16, 17]
    assert step.token_ids() == [5, 6], "asked again, when its memory is another's"

"""Copies and checksums of KV blocks."""

import pytest
import torch
import xxhash

block_copy = pytest.importorskip("llm.ops.gpu.block_copy")
checksum = pytest.importorskip("llm.ops.gpu.checksum")


def ids(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("source_ids", "target_ids"), [([4, 0, 2], None), (None, [5, 1, 3]), ([6, 6, 1, 0], [0, 2, 3, 6])])
@pytest.mark.parametrize("shape", [(2, 2, 1, 4, 6), (3, 2, 3, 16, 64)])
def test_blocks_are_copied_to_their_places_only(device, source_ids, target_ids, shape):
    source, target = torch.randn(7, *shape, device=device), torch.full((7, *shape), torch.nan, device=device)
    expected = target.clone()
    arguments = ids(source_ids, device), ids(target_ids, device)
    block_copy.copy_blocks_reference(source, expected, *arguments)
    block_copy.copy_blocks(source, target, *arguments)
    assert torch.equal(target.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("shape", [(1, 2, 1, 16, 32), (2, 2, 2, 16, 16), (3, 2, 3, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_is_xxh3_of_the_bytes(device, shape, dtype):
    pool = torch.randn(5, *shape, device=device).to(dtype)
    wanted = [3, 0, 3]
    sums = checksum.block_checksums(pool, ids(wanted, device))
    expected = [xxhash.xxh3_64_intdigest(pool[index].cpu().view(torch.uint8).numpy().tobytes()) for index in wanted]
    assert [value % (1 << 64) for value in sums.tolist()] == expected


@pytest.mark.parametrize(
    ("source_ids", "target_ids", "shape"),
    [
        ([4], [1], (2, 2, 2, 16, 16)),
        ([6, 6, 1], [0, 5, 3], (1, 2, 1, 16, 32)),
        ([2, 5], [2, 1], (1, 2, 9, 16, 32)),
        (None, [6, 2, 3], (1, 2, 5, 16, 16)),
    ],
)
def test_what_is_copied_is_summed(device, source_ids, target_ids, shape):
    """Blocks of 8, 4, 36 and 10 KiB: a program's stretches are 8, or fewer at a block's end."""
    source, target = torch.randn(7, *shape, device=device), torch.full((7, *shape), torch.nan, device=device)
    wanted, room = target.clone(), checksum.checksum_room(target, 3)
    block_copy.copy_blocks_reference(source, wanted, ids(source_ids, device), ids(target_ids, device))
    checksum.copy_and_sum_stretches(source, target, ids(source_ids, device), ids(target_ids, device), room)
    assert torch.equal(target.nan_to_num(9.0), wanted.nan_to_num(9.0))
    sums = torch.empty(len(target_ids), dtype=torch.int64, device=device)
    checksum.finish_checksums(target, ids(target_ids, device), room, sums)
    assert sums.tolist() == checksum.block_checksums(target, ids(target_ids, device)).tolist()


def test_one_flipped_bit_changes_the_checksum(device):
    pool = torch.randn(1, 2, 2, 2, 16, 32, device=device)
    before = checksum.block_checksums(pool, ids([0], device)).item()
    pool.view(torch.int32).view(-1)[4095] ^= 1 << 20
    assert checksum.block_checksums(pool, ids([0], device)).item() != before

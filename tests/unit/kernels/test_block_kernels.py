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


def test_one_flipped_bit_changes_the_checksum(device):
    pool = torch.randn(1, 2, 2, 2, 16, 32, device=device)
    before = checksum.block_checksums(pool, ids([0], device)).item()
    pool.view(torch.int32).view(-1)[4095] ^= 1 << 20
    assert checksum.block_checksums(pool, ids([0], device)).item() != before

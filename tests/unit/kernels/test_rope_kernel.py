"""Rotation and the write into the pool, in one launch."""

import pytest
import torch

from llm.ops.rope import make_rotation
from llm.ops.rope import rotate_and_write as reference
from tests.fakes.paged_batches import Heads, make_paged, relative_error

rope = pytest.importorskip("llm.ops.gpu.rope")

SHAPES = [Heads(4, 2, 16, 4), Heads(9, 3, 64), Heads(20, 2, 80, 8), Heads(3, 3, 96)]


def run(paged, layer, angles):
    places = rope.KvPlaces(
        torch.from_numpy(paged.batch.row_blocks).to(paged.pool.device),
        torch.from_numpy(paged.batch.row_offsets).to(paged.pool.device),
    )
    rope.rotate_and_write(paged.qkv, angles, places, paged.pool, layer)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_turns_and_writes_like_the_reference(device, heads, layer):
    paged = make_paged([(3, 3), (1, 21), (5, 12)], heads, 16, device)
    positions = torch.from_numpy(paged.batch.positions).to(device)
    rotation = make_rotation(torch.rand(heads.dim // 2, device=device), positions)
    qkv, pool = paged.qkv.clone(), paged.pool.clone()
    reference(qkv, rotation, paged.batch, pool, layer)
    run(paged, layer, rope.Angles(rotation.cos, rotation.sin))
    assert relative_error(paged.qkv, qkv) < 1e-6
    assert torch.equal(paged.pool.isnan(), pool.isnan())
    assert relative_error(paged.pool.nan_to_num(), pool.nan_to_num()) < 1e-6


def test_looks_angles_up_by_position(device):
    heads = Heads(4, 2, 16)
    paged = make_paged([(2, 30), (1, 7)], heads, 16, device)
    positions = torch.from_numpy(paged.batch.positions).to(device)
    frequencies = torch.rand(heads.dim // 2, device=device)
    table = make_rotation(frequencies, torch.arange(40, device=device))
    expected = paged.qkv.clone()
    reference(expected, make_rotation(frequencies, positions), paged.batch, paged.pool.clone(), 0)
    run(paged, 0, rope.Angles(table.cos, table.sin, positions))
    assert relative_error(paged.qkv, expected) < 1e-6


def test_padding_rows_write_nothing(device):
    paged = make_paged([(2, 9), (1, 5)], Heads(4, 2, 16), 16, device)
    paged.batch.row_blocks[:] = -1
    before = paged.pool.clone()
    rotation = make_rotation(torch.rand(8, device=device), torch.from_numpy(paged.batch.positions).to(device))
    run(paged, 0, rope.Angles(rotation.cos, rotation.sin))
    assert torch.equal(paged.pool.nan_to_num(123.0), before.nan_to_num(123.0))

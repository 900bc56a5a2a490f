"""Prefill and decode attention over paged K and V against the torch reference."""

import numpy as np
import pytest
import torch

from llm.ops.attention import paged_attention as reference
from llm.ops.rope import make_rotation, rotate_and_write
from tests.fakes.paged_batches import Heads, Paged, make_paged, make_tiles, relative_error

chunks = pytest.importorskip("prefill_svc.kernels.chunk_attention")
library = pytest.importorskip("prefill_svc.kernels.library_attention")
paged_attention = pytest.importorskip("decode_svc.kernels.paged_attention")
rope = pytest.importorskip("llm.ops.gpu.rope")

SHAPES = [Heads(4, 2, 16, 4), Heads(6, 2, 64), Heads(4, 1, 80), Heads(2, 2, 96, 8), Heads(7, 1, 128)]
PACKED = [(5, 5), (1, 20), (33, 40)]
DECODED = [(1, 1), (3, 19), (2, 130)]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prefill_attention_is_the_reference(device, heads):
    attention = chunks.ChunkAttention(chunks.Shape(rows=16, tokens=16, num_warps=4))
    paged = make_paged(PACKED, heads, attention.tile_tokens, device)
    out = attention(paged.qkv, paged.tiles, paged.pool, 1)
    assert relative_error(out, reference(paged.qkv, paged.batch, paged.pool, 1)) < 1e-5


@pytest.mark.parametrize("lengths", [[(1, 1)], [(128, 128)], [(129, 300), (2, 2)]], ids=str)
def test_prefill_attention_with_the_shape_in_use(device, lengths):
    attention = chunks.ChunkAttention()
    paged = make_paged(lengths, Heads(2, 1, 64), attention.tile_tokens, device)
    assert relative_error(attention(paged.qkv, paged.tiles, paged.pool, 0), reference(paged.qkv, paged.batch, paged.pool, 0)) < 1e-5


def put_new_tokens_into_pool(paged: Paged, heads: Heads, layer: int) -> None:
    """K and V of the new tokens, which the library reads where the projection left them, as the pool has them."""
    rows = paged.qkv.view(len(paged.batch.positions), -1, heads.dim)
    for row, (block, offset) in enumerate(zip(paged.batch.row_blocks.tolist(), paged.batch.row_offsets.tolist(), strict=True)):
        paged.pool[block, layer, 0, :, offset] = rows[row, heads.query : heads.query + heads.kv].to(paged.pool.dtype)
        paged.pool[block, layer, 1, :, offset] = rows[row, heads.query + heads.kv :].to(paged.pool.dtype)


@pytest.mark.parametrize("whole", [[0, 16, 0], [0, 33, 0], [0, 0, 20], [0, 33, 20]], ids=str)
def test_first_tokens_of_fresh_prompts_may_be_taken_at_once(device, whole):
    heads, attention = Heads(4, 2, 16), chunks.ChunkAttention(chunks.Shape(rows=16, tokens=16, num_warps=4))
    paged = make_paged([(5, 30), (33, 33), (20, 20)], heads, attention.tile_tokens, device)
    put_new_tokens_into_pool(paged, heads, 1)
    tiles = make_tiles(paged.batch, attention.tile_tokens, device, np.array(whole, np.int32))
    assert sum(tiles.counts.tolist()) + sum(whole) == 58
    expected = reference(paged.qkv, paged.batch, paged.pool, 1)
    assert relative_error(attention(paged.qkv, tiles, paged.pool, 1), expected) < 1e-5


def test_a_single_prompt_taken_at_once_needs_no_tiles(device):
    heads, attention = Heads(4, 2, 16), chunks.ChunkAttention()
    paged = make_paged([(40, 40)], heads, attention.tile_tokens, device)
    put_new_tokens_into_pool(paged, heads, 0)
    tiles = make_tiles(paged.batch, attention.tile_tokens, device, np.array([40], np.int32))
    assert tiles.num_tiles == 0
    assert relative_error(attention(paged.qkv, tiles, paged.pool, 0), reference(paged.qkv, paged.batch, paged.pool, 0)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[(2048, 2048)], [(3100, 3100), (70, 200), (2048, 2048)]], ids=str)
def test_the_library_takes_whole_steps_of_long_prompts(device, lengths):
    if device.type != "cuda":
        pytest.skip("no CUDA device")
    heads, attention = Heads(8, 2, 128), chunks.ChunkAttention()
    paged = make_paged(lengths, heads, attention.tile_tokens, device, torch.bfloat16)
    put_new_tokens_into_pool(paged, heads, 0)
    whole = attention.whole_tokens(paged.batch, paged.pool)
    assert whole.tolist() == [new // 1024 * 1024 if new >= 2048 else 0 for new, _ in lengths]
    tiles = make_tiles(paged.batch, attention.tile_tokens, device, whole)
    expected = reference(paged.qkv.float(), paged.batch, paged.pool.float(), 0)
    assert relative_error(attention(paged.qkv, tiles, paged.pool, 0), expected) < 1e-2


def test_prompts_with_a_prefix_and_short_ones_stay_in_tiles():
    paged = make_paged([(2047, 2047), (2048, 2064), (3000, 3000)], Heads(1, 1, 16), 128, torch.device("cpu"))
    assert library.whole_tokens(paged.batch).tolist() == [0, 0, 2048]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_attention_is_the_reference(device, heads):
    attention = paged_attention.PagedAttention()
    paged = make_paged(DECODED, heads, attention.tile_tokens, device)
    expected = reference(paged.qkv, paged.batch, paged.pool, 1)
    assert relative_error(attention(paged.qkv, paged.tiles, paged.pool, 1), expected) < 1e-5


@pytest.mark.parametrize("new", [1, 2, 7, 16, 21])
def test_decode_attention_of_several_new_tokens(device, new):
    """More than a tile's tokens are cut into several tiles; the context is long enough to be split."""
    attention = paged_attention.PagedAttention()
    paged = make_paged([(new, 200), (1, 90)], Heads(4, 1, 16), attention.tile_tokens, device)
    expected = reference(paged.qkv, paged.batch, paged.pool, 0)
    for _ in range(2 if new == 1 else 1):
        assert relative_error(attention(paged.qkv, paged.tiles, paged.pool, 0), expected) < 1e-5


def make_turned(lengths, heads, device, dtype=torch.float32):
    """One new token a sequence, of which the pool knows nothing yet; angles by position; what comes out, and the pool after it."""
    paged = make_paged([(1, total) for total in lengths], heads, 16, device, dtype)
    blocks, offsets = (torch.from_numpy(array).long().to(device) for array in (paged.batch.row_blocks, paged.batch.row_offsets))
    paged.pool[blocks, :, :, :, offsets] = torch.nan
    frequencies = torch.rand(heads.dim // 2, device=device)
    table = make_rotation(frequencies, torch.arange(max(lengths), device=device))
    qkv, pool = paged.qkv.to(torch.float32, copy=True), paged.pool.to(torch.float32, copy=True)
    rotate_and_write(qkv, make_rotation(frequencies, torch.from_numpy(paged.batch.positions).to(device)), paged.batch, pool, 1)
    return paged, rope.Angles(table.cos, table.sin), reference(qkv, paged.batch, pool, 1), pool


@pytest.mark.parametrize(
    ("heads", "lengths"), [(heads, [2, 70]) for heads in SHAPES] + [(Heads(2, 1, 16), [1, 16, 17, 33, 130])], ids=str
)
def test_the_next_token_is_turned_written_and_attended_at_once(device, heads, lengths):
    """Long contexts are split; own tokens begin and end pages, and the stretches and splits of earlier ones."""
    attention = paged_attention.PagedAttention(paged_attention.Stretch(16, least_tokens=32))
    paged, angles, expected, pool = make_turned(lengths, heads, device)
    given = paged.qkv.clone()
    out = attention.turn_and_attend(paged.qkv, angles, paged.tiles, paged.pool, 1)
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(paged.qkv, given)
    assert torch.equal(paged.pool.isnan(), pool.isnan())
    assert relative_error(paged.pool.nan_to_num(), pool.nan_to_num()) < 1e-6
    assert torch.equal(attention.turn_and_attend(paged.qkv, angles, paged.tiles, paged.pool, 1), out)


def test_the_next_token_as_steps_take_it(device):
    """With the stretch in use, in half precision."""
    paged, angles, expected, pool = make_turned([1, 65, 90], Heads(4, 2, 64), device, torch.float16)
    out = paged_attention.PagedAttention().turn_and_attend(paged.qkv, angles, paged.tiles, paged.pool, 1)
    assert relative_error(out, expected) < 2e-3
    assert relative_error(paged.pool.nan_to_num(), pool.nan_to_num()) < 1e-3


def test_several_new_tokens_are_not_taken_at_once(device):
    paged = make_paged([(2, 5)], Heads(4, 2, 16), 16, device)
    angles = rope.Angles(torch.ones(5, 8, device=device), torch.zeros(5, 8, device=device))
    with pytest.raises(AssertionError, match="more tokens"):
        paged_attention.PagedAttention().turn_and_attend(paged.qkv, angles, paged.tiles, paged.pool, 1)


def test_half_precision(device):
    for attention in (paged_attention.PagedAttention(), chunks.ChunkAttention(chunks.Shape(rows=16, tokens=32, num_warps=4))):
        paged = make_paged([(4, 90), (1, 33)], Heads(4, 2, 64), attention.tile_tokens, device, torch.float16)
        expected = reference(paged.qkv.float(), paged.batch, paged.pool.float(), 1)
        assert relative_error(attention(paged.qkv, paged.tiles, paged.pool, 1), expected) < 2e-3


def test_tiles_cover_each_row_once_longest_first():
    paged = make_paged(PACKED, Heads(2, 1, 16), 16, torch.device("cpu"))
    tiles = paged.tiles
    rows = [
        row for start, count in zip(tiles.rows.tolist(), tiles.counts.tolist(), strict=True) for row in range(start, start + count)
    ]
    assert sorted(rows) == list(range(39))
    assert np.all(np.diff(tiles.positions.numpy()) <= 0)
    assert [int(paged.batch.positions[row]) for row in tiles.rows.tolist()] == tiles.positions.tolist()

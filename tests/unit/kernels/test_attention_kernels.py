"""Prefill and decode attention over paged K and V against the torch reference."""

import numpy as np
import pytest
import torch

from llm.ops.attention import paged_attention as reference
from tests.fakes.paged_batches import Heads, Paged, make_paged, make_tiles, relative_error

chunks = pytest.importorskip("prefill_svc.kernels.chunk_attention")
library = pytest.importorskip("prefill_svc.kernels.library_attention")
paged_attention = pytest.importorskip("decode_svc.kernels.paged_attention")

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

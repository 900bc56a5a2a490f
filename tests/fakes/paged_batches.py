"""Batches over a pool of KV blocks whose unwritten places hold NaN, so that reading one of them shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llm.batch import Batch, Integers, SequenceSlice, build_batch
from llm.gpu.tiles import Tiles, cut_tiles, whole_rows


@dataclass(frozen=True)
class Heads:
    """The attention's shape."""

    query: int
    kv: int
    dim: int
    block_tokens: int = 16


@dataclass(frozen=True)
class Paged:
    """A batch whose context is in the pool, its tiles, and q, k, v of the new tokens."""

    batch: Batch
    tiles: Tiles
    pool: torch.Tensor
    qkv: torch.Tensor


def make_paged(
    lengths: list[tuple[int, int]], heads: Heads, tile_tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Paged:
    """`lengths` are (new tokens, all tokens) of each sequence. Blocks are dealt out in random order over two layers."""
    counts = [-(-total // heads.block_tokens) for _, total in lengths]
    dealt = iter(np.random.default_rng(7).permutation(sum(counts) + 3).tolist())
    slices = [
        SequenceSlice(list(range(new)), total - new, [next(dealt) for _ in range(count)])
        for (new, total), count in zip(lengths, counts, strict=True)
    ]
    batch = build_batch(slices, heads.block_tokens)
    shape = (sum(counts) + 3, 2, 2, heads.kv, heads.block_tokens, heads.dim)
    pool = torch.full(shape, torch.nan, dtype=torch.float32)
    for item, (_, total) in zip(slices, lengths, strict=True):
        for position in range(total):
            cell = pool[item.block_ids[position // heads.block_tokens], :, :, :, position % heads.block_tokens]
            cell.copy_(torch.randn(cell.shape))
    qkv = torch.randn(len(batch.positions), (heads.query + 2 * heads.kv) * heads.dim)
    return Paged(batch, make_tiles(batch, tile_tokens, device), pool.to(device, dtype), qkv.to(device, dtype))


def make_tiles(batch: Batch, tile_tokens: int, device: torch.device, whole: Integers | None = None) -> Tiles:
    """Tiles with tensors of their own, as a runner would upload them."""
    cut = cut_tiles(batch, tile_tokens, whole)
    arrays = {name: torch.from_numpy(array).to(device) for name, array in cut.items()}
    return Tiles(
        sequences=arrays["tile_sequences"],
        rows=arrays["tile_rows"],
        counts=arrays["tile_counts"],
        positions=arrays["tile_positions"],
        block_starts=torch.from_numpy(batch.block_starts).to(device),
        block_ids=torch.from_numpy(batch.block_ids).to(device),
        num_tiles=len(arrays["tile_rows"]),
        max_count=int(cut["tile_counts"].max(initial=0)),
        whole=() if whole is None else whole_rows(batch, whole),
    )


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the reference's norm, in float64; NaN stays NaN and so fails every comparison."""
    wide = reference.double()
    return float((out.double() - wide).norm() / wide.norm())

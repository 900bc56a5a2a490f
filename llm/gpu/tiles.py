"""Cuts a batch's new tokens into the tiles that attention programs take, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llm.batch import Batch, Integers


@dataclass(frozen=True)
class Tiles:
    """`t` tiles, each of consecutive new tokens of one sequence; tensors of int32 on the device.

    A tile's row i has position positions[tile] + i and attends to its sequence's tokens up to that.
    A tile of count 0 is padding: its row of results is zeros.
    """

    sequences: torch.Tensor
    """[t]"""
    rows: torch.Tensor
    """[t], each tile's first row in the batch."""
    counts: torch.Tensor
    """[t]"""
    positions: torch.Tensor
    """[t], of each tile's first token."""
    block_starts: torch.Tensor
    """[s + 1]"""
    block_ids: torch.Tensor
    """Each sequence's blocks in order, from block_starts[i]."""
    num_tiles: int
    max_count: int
    whole: tuple[slice, ...] = ()
    """Rows of the batch that no tile holds: each a sequence's first tokens, which attention takes at once."""


def whole_rows(batch: Batch, whole: Integers) -> tuple[slice, ...]:
    """The rows of each sequence's first `whole[i]` new tokens, where there are any."""
    starts = batch.row_starts
    return tuple(slice(int(starts[index]), int(starts[index] + whole[index])) for index in np.flatnonzero(whole))


def cut_tiles(batch: Batch, tile_tokens: int, whole: Integers | None = None) -> dict[str, Integers]:
    """The tile arrays of a batch, tiles with the longest contexts first, for a launch should end on short work.

    Tiles begin after the first `whole[i]` new tokens of sequence i.
    """
    taken = np.zeros(len(batch.lengths), np.int32) if whole is None else whole
    counts = np.diff(batch.row_starts) - taken
    tiles = -(-counts // tile_tokens)
    sequences = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
    within = np.arange(int(tiles.sum()), dtype=np.int32) - np.repeat(np.cumsum(tiles) - tiles, tiles).astype(np.int32)
    skipped = within * np.int32(tile_tokens)
    positions = (batch.lengths - counts)[sequences] + skipped
    order = np.argsort(-positions, kind="stable")
    return {
        "tile_sequences": sequences[order],
        "tile_rows": ((batch.row_starts[:-1] + taken)[sequences] + skipped)[order].astype(np.int32),
        "tile_counts": np.minimum(counts[sequences] - skipped, tile_tokens)[order].astype(np.int32),
        "tile_positions": positions[order].astype(np.int32),
    }

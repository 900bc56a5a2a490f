"""One forward pass's worth of token slices, laid out flat for the operations."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int32]
Ints = Integers | array  # type: ignore[type-arg]
"""What C calls ints, in either kind of array."""


@dataclass(slots=True)
class SequenceSlice:
    """The next tokens of one sequence. `block_ids` must reach to position start + len(token_ids).

    Left as made, but not frozen: each step makes one a sequence, and a frozen one takes three times as long to make.
    """

    token_ids: Sequence[int]
    """New tokens to compute, at least one."""
    start: int
    """Tokens already in the KV pool."""
    block_ids: Sequence[int]
    logits: Literal["none", "last", "all"] = "last"


@dataclass(frozen=True)
class Batch:
    """`n` rows (tokens) of `s` sequences, concatenated. Row and block ranges of sequence i are starts[i] to starts[i + 1]."""

    token_ids: npt.NDArray[np.int64]
    """[n]"""
    positions: Integers
    """[n], position of each token in its sequence."""
    row_blocks: Integers
    """[n], the pool block that holds each token's K and V."""
    row_offsets: Integers
    """[n], the token's place in that block."""
    row_starts: Integers
    """[s + 1]"""
    lengths: Integers
    """[s], tokens of each sequence, the new ones included."""
    block_ids: Integers
    """[sum of blocks], each sequence's blocks in order."""
    block_starts: Integers
    """[s + 1]"""
    logits_rows: npt.NDArray[np.int64]
    """[m], rows whose logits are wanted, ascending."""

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The same arrays as tensors of 64-bit integers, for torch's indexing."""
        return {
            name: torch.from_numpy(array.astype(np.int64, copy=False)) for name, array in vars(self).items() if _is_array(array)
        }

    @cached_property
    def single_rows(self) -> Integers:
        """Sequences with exactly one new token, by index."""
        return np.flatnonzero(np.diff(self.row_starts) == 1).astype(np.int32)

    @cached_property
    def chunks(self) -> list[int]:
        """Sequences with more than one new token, by index."""
        return [int(index) for index in np.flatnonzero(np.diff(self.row_starts) > 1)]

    def rows(self, sequence: int) -> slice:
        return slice(int(self.row_starts[sequence]), int(self.row_starts[sequence + 1]))

    def blocks(self, sequence: int) -> Integers:
        return self.block_ids[self.block_starts[sequence] : self.block_starts[sequence + 1]]


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def build_batch(slices: Sequence[SequenceSlice], block_tokens: int) -> Batch:
    """Lays out the slices in order. Asserts that each has tokens and enough blocks: the batchers see to that."""
    counts = np.array([len(item.token_ids) for item in slices], dtype=np.int32)
    starts = np.array([item.start for item in slices], dtype=np.int32)
    used = (starts + counts + block_tokens - 1) // block_tokens
    assert len(slices) > 0 and counts.min() > 0, "a slice without tokens"
    assert all(len(item.block_ids) >= need for item, need in zip(slices, used, strict=True)), "a slice without room in its blocks"
    row_starts, block_starts = _starts(counts), _starts(used)
    block_ids = np.concatenate([np.asarray(item.block_ids[:need], np.int32) for item, need in zip(slices, used, strict=True)])
    sequences = np.repeat(np.arange(len(slices), dtype=np.int32), counts)
    positions = np.arange(row_starts[-1], dtype=np.int32) + (starts - row_starts[:-1])[sequences]
    return Batch(
        token_ids=np.concatenate([np.asarray(item.token_ids, np.int64) for item in slices]),
        positions=positions,
        row_blocks=block_ids[block_starts[sequences] + positions // block_tokens],
        row_offsets=positions % block_tokens,
        row_starts=row_starts,
        lengths=starts + counts,
        block_ids=block_ids,
        block_starts=block_starts,
        logits_rows=_logits_rows(slices, row_starts),
    )


def _starts(counts: Integers) -> Integers:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])


def _logits_rows(slices: Sequence[SequenceSlice], row_starts: Integers) -> npt.NDArray[np.int64]:
    rows: list[int] = []
    for index, item in enumerate(slices):
        end = int(row_starts[index + 1])
        if item.logits == "all":
            rows.extend(range(int(row_starts[index]), end))
        elif item.logits == "last":
            rows.append(end - 1)
    return np.array(rows, dtype=np.int64)

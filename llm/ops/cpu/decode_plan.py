"""Which thread attends to what, in a batch of sequences with one new token each. Made once a step, used by every layer."""

from __future__ import annotations

import numpy as np

from llm.batch import Batch
from llm.ops.cpu.attention import SPLIT_TOKENS


class DecodePlan:
    """Every sequence is split at multiples of `split_tokens`; the parts go to the threads by tokens, not by number."""

    def __init__(self, batch: Batch, num_kv_heads: int, block_tokens: int, threads: int) -> None:
        self.batch = batch
        blocks_per_split = max(1, SPLIT_TOKENS // block_tokens)
        self.split_tokens = blocks_per_split * block_tokens
        sequences = batch.single_rows
        lengths = batch.lengths[sequences].astype(np.int64)
        splits = -(-lengths // self.split_tokens)
        self.rows = batch.row_starts[sequences]
        """[s], each sequence's row in the batch."""
        self.places = np.concatenate([np.zeros(1, np.int64), np.cumsum(splits * num_kv_heads)])
        """[s + 1], each sequence's first row of partial results; within, by split, then by kv head."""
        self.num_partial = int(self.places[-1])
        owner = np.repeat(np.arange(len(sequences)), splits * num_kv_heads)
        within = np.arange(self.num_partial) - self.places[owner]
        split, head = within // num_kv_heads, within % num_kv_heads
        first = batch.block_starts[sequences][owner] + split * blocks_per_split
        counts = np.minimum(self.split_tokens, lengths[owner] - split * self.split_tokens)
        flat = np.stack([self.rows[owner], head, first, counts, np.arange(self.num_partial)], axis=1).astype(np.int64)
        self.tasks = _share_out(flat, counts, threads)
        """[threads, m, 5] int64, padded with tasks of no tokens; see attention.decode_splits."""


def _share_out(flat: np.ndarray, costs: np.ndarray, threads: int) -> np.ndarray:
    """Cuts the list where the running cost passes each thread's share."""
    middle = np.cumsum(costs) - costs / 2
    owner = np.minimum((middle * threads / costs.sum()).astype(np.int64), threads - 1)
    counts = np.bincount(owner, minlength=threads)
    tasks = np.zeros((threads, int(counts.max()), flat.shape[1]), np.int64)
    tasks[owner, np.arange(len(flat)) - np.searchsorted(owner, owner)] = flat
    return tasks

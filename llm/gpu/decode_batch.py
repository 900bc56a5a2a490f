"""What a device needs of a decode step, laid out in a few operations over all its sequences at once.

The same arrays as those of llm.gpu.device_batch.host_arrays. A step of few milliseconds has hundreds of sequences of hundreds of
blocks each: nothing here is done block by block, and little sequence by sequence. Nor is anything done for which numpy lets other
threads have the interpreter, as for sorting and for copies of more than 500 elements; see llm.gpu.quiet_calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from llm.batch import Integers, SequenceSlice


def is_decode(slices: Sequence[SequenceSlice]) -> bool:
    """One token a sequence and logits of all: what graphs are captured for."""
    return all(item.logits == "last" and len(item.token_ids) == 1 for item in slices)


def decode_arrays(slices: Sequence[SequenceSlice], sources: Sequence[int] | None, block_tokens: int) -> dict[str, Integers]:
    """By name, `block_ids` last: each sequence's blocks whole, spare ones included."""
    count = len(slices)
    positions = np.fromiter((item.start for item in slices), np.int32, count)
    blocks = [_as_ints(item.block_ids) for item in slices]
    block_ids = np.frombuffer(b"".join(blocks), np.int32)
    block_starts = np.zeros(count + 1, np.int32)
    np.cumsum(np.fromiter(map(len, blocks), np.int32, count), out=block_starts[1:])
    places = block_starts[:-1] + positions // block_tokens
    assert (places < block_starts[1:]).all(), "a slice without room in its blocks"
    rows = np.arange(count, dtype=np.int32)
    order = np.array(sorted(range(count), key=positions.tolist().__getitem__, reverse=True), np.int32)
    return {
        "token_ids": np.fromiter((item.token_ids[0] for item in slices), np.int32, count),
        "sources": np.full(count, -1, np.int32) if sources is None else np.asarray(sources, np.int32),
        "positions": positions,
        "row_blocks": block_ids[places],
        "row_offsets": positions % block_tokens,
        "logits_rows": rows,
        "tile_sequences": order,
        "tile_rows": order,
        "tile_counts": np.ones(count, np.int32),
        "tile_positions": positions[order],
        "block_starts": block_starts,
        "block_ids": block_ids,
    }


def _as_ints(block_ids: Sequence[int]) -> array[int]:
    return block_ids if isinstance(block_ids, array) else array("i", block_ids)

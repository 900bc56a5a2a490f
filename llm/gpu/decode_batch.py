"""What a device needs of a decode step.

The same numbers as those of llm.gpu.device_batch.host_arrays, in arrays of C ints. A step of few milliseconds has hundreds of
sequences of hundreds of blocks each: nothing here is done block by block. It is done by plain lists: between two steps the
processor's caches forget numpy's code, which then takes twice as long at 24 sequences, half as long again at 64, and as long at
256. Nor does any of it let other threads have the interpreter, as numpy does to sort and to copy more than 500 elements; see
llm.gpu.quiet_calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import getitem, lt

from llm.batch import SequenceSlice


def is_decode(slices: Sequence[SequenceSlice]) -> bool:
    """One token a sequence and logits of all: what graphs are captured for."""
    return all([item.logits == "last" and len(item.token_ids) == 1 for item in slices])


def decode_arrays(slices: Sequence[SequenceSlice], sources: Sequence[int] | None, block_tokens: int) -> dict[str, array[int]]:
    """By name, `block_ids` last: each sequence's blocks whole, spare ones included."""
    count = len(slices)
    positions = [item.start for item in slices]
    blocks = [_as_ints(item.block_ids) for item in slices]
    lengths = list(map(len, blocks))
    places = [position // block_tokens for position in positions]
    assert all(map(lt, places, lengths)), "a slice without room in its blocks"
    order = sorted(range(count), key=positions.__getitem__, reverse=True)
    by_position = array("i", order)
    return {
        "token_ids": array("i", [item.token_ids[0] for item in slices]),
        "sources": array("i", [-1]) * count if sources is None else array("i", sources),
        "positions": array("i", positions),
        "row_blocks": array("i", map(getitem, blocks, places)),
        "row_offsets": array("i", [position % block_tokens for position in positions]),
        "logits_rows": array("i", range(count)),
        "tile_sequences": by_position,
        "tile_rows": by_position,
        "tile_counts": array("i", [1]) * count,
        "tile_positions": array("i", map(positions.__getitem__, order)),
        "block_starts": array("i", accumulate(lengths, initial=0)),
        "block_ids": array("i", b"".join(blocks)),
    }


def _as_ints(block_ids: Sequence[int]) -> array[int]:
    return block_ids if isinstance(block_ids, array) else array("i", block_ids)

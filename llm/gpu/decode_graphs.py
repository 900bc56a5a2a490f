"""Decode steps captured as CUDA graphs, one for each size of batch.

A step of a few milliseconds is some two hundred launches; replaying a graph costs the host one. A graph's shapes are fixed, so a
batch is padded to the next size. Sizes: 1, 2, 4, 8, then steps of 8 to 64, of 16 to 128 and of 32 beyond: padding adds at most a
seventh to the rows of a batch over 48, and costs nothing where the weights' reading dominates; each graph costs start-up time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from llm.batch import Batch, Integers
from llm.gpu.device_batch import DeviceBatch, make_device_batch
from llm.gpu.step import Staged, StepMemory

_PADDING = {"sources": -1, "row_blocks": -1}
"""A padding row reads token 0, writes no K and V, and attends to nothing: its tile counts 0 tokens, and the result is 0."""
_FIXED = (
    "token_ids", "sources", "positions", "row_blocks", "row_offsets", "logits_rows",
    "tile_sequences", "tile_rows", "tile_counts", "tile_positions", "block_starts",
)  # fmt: skip


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Ascending; the last is max_batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch + 32, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


class GraphInputs:
    """The memory that captured graphs read: arrays of fixed places, and the block ids after them."""

    def __init__(self, max_batch: int, max_block_ids: int, device: torch.device) -> None:
        self._stride = max_batch + 1
        self._device = device
        self._memory = torch.zeros(len(_FIXED) * self._stride + max_block_ids, dtype=torch.int32, device=device)
        self._padding = np.zeros((len(_FIXED), self._stride), np.int32)
        for index, name in enumerate(_FIXED):
            self._padding[index] = np.arange(self._stride) if name == "tile_rows" else _PADDING.get(name, 0)
        self.drawn = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """The tokens that the last step drew, by its rows."""

    def fits(self, arrays: Mapping[str, Integers]) -> bool:
        return len(_FIXED) * self._stride + len(arrays["block_ids"]) <= self._memory.shape[0]

    def stage(self) -> Staged:
        """Host memory from which this memory is filled."""
        return Staged(self._memory)

    def upload(self, arrays: Mapping[str, Integers], staged: Staged) -> None:
        """One copy; it waits for nothing and is ordered before what is launched next. `staged` must not be under way any more."""
        num_fixed, block_ids = self._padding.size, arrays["block_ids"]
        fixed = staged.values[:num_fixed].reshape(self._padding.shape)
        fixed[:] = self._padding
        for index, name in enumerate(_FIXED):
            fixed[index, : len(arrays[name])] = arrays[name]
        staged.values[num_fixed : num_fixed + len(block_ids)] = block_ids
        staged.copy(num_fixed + len(block_ids))

    def batch(self, size: int) -> DeviceBatch:
        """A batch of `size` rows, one token a sequence, over this memory."""
        rows = {name: self._memory[index * self._stride :][:size] for index, name in enumerate(_FIXED)}
        rows["block_starts"] = self._memory[_FIXED.index("block_starts") * self._stride :][: size + 1]
        rows["block_ids"] = self._memory[len(_FIXED) * self._stride :]
        return make_device_batch(_shape_only(size), rows, self.drawn, max_count=1)


class DecodeGraphs:
    """Replays the captured step that is large enough."""

    def __init__(self, inputs: GraphInputs, step: Callable[[DeviceBatch], torch.Tensor]) -> None:
        """`step` computes a batch's logits; it must do the same launches each time and never wait."""
        self.inputs = inputs
        self._step = step
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def capture(self, sizes: Iterable[int], captured: Callable[[int], None]) -> None:
        """The largest first: its memory serves the smaller ones too. Each is run once before, for kernels compile then."""
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            batch = self.inputs.batch(size)
            self._step(batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._step(batch)
            self._graphs[size] = graph, logits
            captured(size)

    def holds(self, arrays: Mapping[str, Integers]) -> bool:
        """Whether `replay` can run this batch."""
        return self.size_for(len(arrays["token_ids"])) is not None and self.inputs.fits(arrays)

    def size_for(self, rows: int) -> int | None:
        """The smallest captured size that holds them."""
        return min((size for size in self._graphs if size >= rows), default=None)

    def replay(self, arrays: Mapping[str, Integers], memory: StepMemory) -> torch.Tensor:
        """Uploads by way of `memory` and runs a step; logits [at least as many rows, vocab], valid until the next replay."""
        size = self.size_for(len(arrays["token_ids"]))
        assert size is not None, "ask `holds` first"
        if memory.staged is None:
            memory.staged = self.inputs.stage()
        self.inputs.upload(arrays, memory.staged)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits


def _shape_only(size: int) -> Batch:
    """For a batch whose values are on the device only; nothing reads more of it than how many rows want logits."""
    none: Sequence[int] = ()
    empty = np.array(none, np.int32)
    return Batch(
        token_ids=empty.astype(np.int64),
        positions=empty,
        row_blocks=empty,
        row_offsets=empty,
        row_starts=empty,
        lengths=empty,
        block_ids=empty,
        block_starts=empty,
        logits_rows=np.arange(size, dtype=np.int64),
    )

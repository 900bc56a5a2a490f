"""Steps captured as CUDA graphs, one for each size.

A step is some three hundred launches, which cost the host milliseconds and the interpreter; replaying a graph costs it one. A
graph's shapes are fixed, so a step is padded to the next size; each graph costs start-up time.

Decode, by sequences: 1, 2, 4, 8, then steps of 8 to 64, of 16 to 128 and of 32 beyond: padding adds at most a seventh to the rows
of a batch over 48, and costs nothing where the weights' reading dominates. Prefill, by tokens: few, then steps of 128, which is
what the matrix product rounds up to anyway. Larger prefill steps keep the device busy for longer than launching them takes.

A prefill step is two graphs: behind the first its K and V are in the pool, and may be sent while the second draws the tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import le
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from llm.batch import Batch, Ints
from llm.gpu.device_batch import PER_ROW, PER_TILE, DeviceBatch, make_device_batch
from llm.gpu.draw_graphs import DrawGraphs
from llm.gpu.quiet_calls import QuietGraph
from llm.gpu.step import Staged, StepMemory

Result = TypeVar("Result")
Graph = torch.cuda.CUDAGraph | QuietGraph
Cut = Callable[[], None]
"""Ends the graph that is being captured, and begins the next."""

_PADDING = {"sources": -1, "row_blocks": -1}
"""A padding row reads token 0, writes no K and V, and attends to nothing: its tile counts 0 tokens. Nobody reads its results."""
_FIXED = (*PER_ROW, *PER_TILE, "block_starts")
_PROMPTS = 8
"""Most prompts of a captured prefill step."""


@dataclass(frozen=True)
class GraphSize:
    """What a captured step has room for."""

    rows: int
    sequences: int
    tiles: int
    logits: int

    def length(self, name: str) -> int:
        """Of the array of that name."""
        if name in PER_TILE:
            return self.tiles
        return {"logits_rows": self.logits, "block_starts": self.sequences + 1}.get(name, self.rows)

    def holds(self, needed: GraphSize) -> bool:
        """Whether a batch of that size has room."""
        return all(map(le, needed.counts, self.counts))

    @cached_property
    def counts(self) -> tuple[int, int, int, int]:
        return self.rows, self.sequences, self.tiles, self.logits


def size_of(arrays: Mapping[str, Ints]) -> GraphSize:
    """What a batch's arrays take."""
    rows, logits = len(arrays["token_ids"]), len(arrays["logits_rows"])
    return GraphSize(rows, len(arrays["block_starts"]) - 1, len(arrays["tile_rows"]), logits)


class Fitted(NamedTuple):
    """A batch's arrays, and the captured size that holds them."""

    size: GraphSize
    arrays: Mapping[str, Ints]


def decode_size(sequences: int) -> GraphSize:
    """One token a sequence."""
    return GraphSize(sequences, sequences, sequences, sequences)


def prompt_size(tokens: int, tile_tokens: int, most_logits: int) -> GraphSize:
    """Of a few prompts, each of which may end in a tile that is not full."""
    assert tokens > _PROMPTS, "as many rows as logits would pass for all of them being wanted"
    return GraphSize(tokens, _PROMPTS, -(-tokens // tile_tokens) + _PROMPTS, min(_PROMPTS, most_logits))


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Ascending; the last is max_batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch + 32, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def prompt_sizes(max_tokens: int) -> tuple[int, ...]:
    """Ascending, in tokens; the last is max_tokens."""
    sizes = [16, 32, 64, *range(128, max_tokens, 128)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)


class GraphInputs:
    """The memory that captured graphs read: arrays of fixed places, and the block ids after them.

    `drawn` [n]: the tokens that the last step drew, by its rows. `max_count`: most tokens of a tile.
    """

    def __init__(self, largest: GraphSize, max_block_ids: int, drawn: torch.Tensor, max_count: int = 1) -> None:
        self._stride = max(largest.length(name) for name in _FIXED)
        self._drawn, self._max_count = drawn, max_count
        self._memory = torch.zeros(len(_FIXED) * self._stride + max_block_ids, dtype=torch.int32, device=drawn.device)
        padding = np.zeros((len(_FIXED), self._stride), np.int32)
        for index, name in enumerate(_FIXED):
            padding[index] = np.arange(self._stride) if name == "tile_rows" else _PADDING.get(name, 0)
        self._padding = padding.reshape(-1)

    def fits(self, arrays: Mapping[str, Ints]) -> bool:
        return len(_FIXED) * self._stride + len(arrays["block_ids"]) <= self._memory.shape[0]

    def stage(self) -> Staged:
        """Host memory from which this memory is filled."""
        return Staged(self._memory)

    def upload(self, arrays: Mapping[str, Ints], staged: Staged) -> None:
        """One copy; it waits for nothing and is ordered before what is launched next. `staged` must not be under way any more."""
        num_fixed, block_ids = self._padding.size, arrays["block_ids"]
        values: Any = staged.values.data  # numpy would let others have the interpreter while it copies
        values[:num_fixed] = self._padding.data
        for begin, name in zip(range(0, num_fixed, self._stride), _FIXED, strict=True):
            values[begin : begin + len(arrays[name])] = arrays[name]
        values[num_fixed : num_fixed + len(block_ids)] = block_ids
        staged.copy(num_fixed + len(block_ids))

    def batch(self, size: GraphSize) -> DeviceBatch:
        """A batch of that size over this memory."""
        tensors = {name: self._memory[index * self._stride :][: size.length(name)] for index, name in enumerate(_FIXED)}
        tensors["block_ids"] = self._memory[len(_FIXED) * self._stride :]
        return make_device_batch(_shape_only(size.logits), tensors, self._drawn, self._max_count)


class StepGraphs:
    """Replays the captured step that is large enough."""

    def __init__(self, inputs: GraphInputs, step: Callable[[DeviceBatch, Cut], torch.Tensor], drawing: DrawGraphs) -> None:
        """`step` computes a batch's logits; it must do the same launches each time and never wait. It may call what it is given
        once, when nothing that follows writes to the KV pool."""
        self.inputs = inputs
        self.drawing = drawing
        self._step = step
        self._graphs: dict[GraphSize, tuple[Sequence[Graph], torch.Tensor]] = {}
        self._ascending: list[GraphSize] = []

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def capture(self, sizes: Iterable[GraphSize], captured: Callable[[GraphSize], None]) -> None:
        """The largest first: its memory serves the smaller ones too. Each is run once before, for kernels compile then."""
        pool = torch.cuda.graph_pool_handle()
        with _without_collection():
            for size in sorted(sizes, key=lambda size: size.rows, reverse=True):
                batch = self.inputs.batch(size)
                graphs, logits = _captured(lambda cut, batch=batch: self._step(batch, cut), pool)  # type: ignore[misc]
                self._graphs[size] = graphs, logits
                self.drawing.capture(logits, lambda function: _captured(lambda _: function(), pool)[0][0])
                captured(size)
        self._ascending = sorted(self._graphs, key=lambda size: size.rows)

    def fit(self, arrays: Mapping[str, Ints]) -> Fitted | None:
        """Into the smallest captured size that holds them."""
        if not self.inputs.fits(arrays):
            return None
        needed = size_of(arrays)
        return next((Fitted(size, arrays) for size in self._ascending if size.holds(needed)), None)

    def replay(self, step: Fitted, memory: StepMemory) -> torch.Tensor:
        """Uploads by way of `memory` and runs a step; logits [at least as many rows, vocab], valid until the next replay."""
        if memory.staged is None:
            memory.staged = self.inputs.stage()
        self.inputs.upload(step.arrays, memory.staged)
        (first, *rest), logits = self._graphs[step.size]
        first.replay()
        if rest:
            memory.note_filled()
        for graph in rest:
            graph.replay()
        return logits


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage may hold graphs of a runner that is gone, and to destroy one breaks the capture that is under way."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _captured(function: Callable[[Cut], Result], pool: Any) -> tuple[list[Graph], Result]:
    """A function's launches, cut where it wants, and what it returned while they were captured; it is run once before."""
    function(lambda: None)
    torch.cuda.synchronize()
    graphs: list[torch.cuda.CUDAGraph] = []
    with ExitStack() as capturing:

        def cut() -> None:
            capturing.close()
            graphs.append(torch.cuda.CUDAGraph(keep_graph=True))
            capturing.enter_context(torch.cuda.graph(graphs[-1], pool=pool))

        cut()
        result = function(cut)
    return [QuietGraph(graph) for graph in graphs] if torch.cuda.is_available() else list(graphs), result


def _shape_only(num_logits: int) -> Batch:
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
        logits_rows=np.arange(num_logits, dtype=np.int64),
    )

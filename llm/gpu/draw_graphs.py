"""Drawing by temperature, captured as graphs: for each captured step one that filters by top_k and top_p, and one that does not.

Some dozen launches and as many pieces of memory cost the host half a millisecond, and the interpreter each time; see
llm.gpu.quiet_calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from llm.gpu.quiet_calls import QuietGraph
from llm.gpu.step import Staged, StepMemory, is_likeliest, parameter_columns
from llm.ops.gpu.draw import DrawParameters, draw
from llm.sampling import SampleRow

_COLUMNS = {"uniforms": 2, "top_ps": 2, "temperatures": 1, "top_ks": 1, "min_ps": 1}
"""In 32-bit words a row; the wide ones first, for their alignment."""
_TYPES = {"uniforms": "float64", "top_ps": "float64", "temperatures": "float32", "top_ks": "int32", "min_ps": "float32"}
_PADDING = {"top_ps": 1.0}
"""A row that nobody asked for is drawn with a temperature of 0."""

Values = npt.NDArray[np.generic]


class DrawInputs:
    """The memory that captured draws read: each parameter's column."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._rows = max_rows + max_rows % 2
        self._memory = torch.zeros(self._rows * sum(_COLUMNS.values()), dtype=torch.int32, device=device)

    def stage(self) -> Staged:
        """Host memory from which this memory is filled."""
        return Staged(self._memory)

    def upload(self, columns: Mapping[str, Values], staged: Staged) -> None:
        """`columns` by the names of DrawParameters, one value a row. `staged` must not be under way any more."""
        begin = 0
        for name, words in _COLUMNS.items():
            onto = staged.values[begin : begin + words * self._rows].view(_TYPES[name])
            onto[:] = _PADDING.get(name, 0)
            onto[: len(columns[name])] = columns[name]
            begin += words * self._rows
        staged.copy(begin)

    def parameters(self, rows: int, filters: bool) -> DrawParameters:
        """Of the first rows, over this memory."""
        views, begin = {}, 0
        for name, words in _COLUMNS.items():
            column = self._memory[begin : begin + words * self._rows].view(getattr(torch, _TYPES[name]))
            views[name] = column[:rows]
            begin += words * self._rows
        return DrawParameters(**views, any_top_k=filters, any_top_p=filters)


class DrawGraphs:
    """Draws from the logits of captured steps, by where these lie and whether any row is filtered, into `drawn` [n] int32."""

    def __init__(self, drawn: torch.Tensor) -> None:
        self._drawn = drawn
        self._inputs = DrawInputs(drawn.shape[0], drawn.device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | QuietGraph] = {}

    def capture(self, logits: torch.Tensor, record: Callable[[Callable[[], None]], torch.cuda.CUDAGraph | QuietGraph]) -> None:
        """For a captured step whose logits [rows, vocab] always lie there. `record` runs a function, then captures it."""
        for filters in (False, True):
            parameters = self._inputs.parameters(logits.shape[0], filters)
            self._graphs[logits.data_ptr(), filters] = record(
                lambda parameters=parameters: draw(logits, parameters, self._drawn[: logits.shape[0]])  # type: ignore[misc]
            )

    def replay(self, logits: torch.Tensor, rows: Sequence[SampleRow], positions: Sequence[int], memory: StepMemory) -> None:
        """Replaces the likeliest tokens, which `drawn` holds already, as llm.gpu.step.draw_rows does.

        `logits` are those of a captured step that was replayed just now.
        """
        if all(is_likeliest(row) for row in rows):
            return
        columns = parameter_columns(rows, positions)
        if memory.parameters is None:
            memory.parameters = self._inputs.stage()
        self._inputs.upload(columns, memory.parameters)
        filters = bool(columns["top_ks"].any() or (columns["top_ps"] < 1.0).any())
        self._graphs[logits.data_ptr(), filters].replay()

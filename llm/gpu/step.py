"""A step in flight: its tokens are drawn on the device, and the host may launch the next step before it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm.gpu import quiet_calls
from llm.ops.gpu.draw import DrawParameters, draw
from llm.sampling import SampleRow, uniform
from llm.sampling_params import SamplingParams

_LIKELIEST = SamplingParams(temperature=0.0)


class Staged:
    """Inputs of a captured step on their way to the device, in memory that is locked once."""

    def __init__(self, device: torch.Tensor) -> None:
        """`device` [n] int32 is what captured steps read."""
        self._device = device
        self._host = torch.zeros(device.shape, dtype=device.dtype, pin_memory=device.is_cuda)
        self.values: npt.NDArray[np.int32] = self._host.numpy()
        """To be filled in before `copy`."""

    def copy(self, num_values: int) -> None:
        """Begins to bring the first `num_values` to the device, ordered before what is launched next."""
        if self._device.is_cuda:
            quiet_calls.to_device(self._device, self._host, num_values)
        else:
            self._device[:num_values] = self._host[:num_values]


class StepMemory:
    """What one step in flight needs on the host. Used again once its tokens have been read."""

    def __init__(self, drawn: torch.Tensor) -> None:
        """`drawn` [n] int32, on the device: where steps leave their tokens."""
        self.free = True
        self.staged: Staged | None = None
        self.parameters: Staged | None = None
        self._logits: torch.Tensor | None = None
        self._drawn = drawn
        self._host = torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=drawn.is_cuda)
        self._tokens: npt.NDArray[np.int32] = self._host.numpy()
        self._arrived = _made_event() if drawn.is_cuda else None
        self._filled = _made_event() if drawn.is_cuda else None
        self._is_filled_early = False

    def take(self) -> None:
        """For another step."""
        self.free, self._is_filled_early = False, False

    def note_filled(self) -> None:
        """What of the step is launched from now on does not write to the KV pool."""
        if self._filled is not None:
            quiet_calls.record(self._filled)
        self._is_filled_early = True

    def fetch(self, count: int, num_kept: int = 0) -> DrawnStep:
        """Begins the copy of the first `count` tokens to the host; later launches on the stream may draw others."""
        if self._arrived is None:
            self._host.copy_(self._drawn)
        else:
            quiet_calls.to_host(self._host, self._drawn)
            quiet_calls.record(self._arrived)
        return DrawnStep(self, count, num_kept)

    def keep(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Begins to copy rows of logits [n, vocab] to the host; later launches on the stream may write others."""
        if self._logits is None or len(self._logits) < len(rows):
            self._logits = torch.empty(len(rows), logits.shape[1], dtype=logits.dtype, pin_memory=logits.is_cuda)
        for place, row in enumerate(rows):
            self._logits[place].copy_(logits[row], non_blocking=True)

    def kept(self, count: int) -> torch.Tensor:
        assert self._logits is not None, "nothing was kept"
        return self._logits[:count]

    def wait_filled(self) -> None:
        event = self._filled if self._is_filled_early else self._arrived
        if event is not None:
            event.synchronize()

    def read(self, count: int) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._tokens[:count].tolist()
        return tokens


class DrawnStep:
    """Tokens on their way to the host, and the logits of those rows that the host draws from."""

    def __init__(self, memory: StepMemory, count: int, num_kept: int) -> None:
        self._memory, self._count, self._num_kept = memory, count, num_kept
        self._tokens: list[int] | None = None

    def wait_filled(self) -> None:
        """Returns once K and V of the step's tokens are in the pool."""
        if self._tokens is None:
            self._memory.wait_filled()

    def token_ids(self) -> list[int]:
        """Waits for this step only."""
        if self._tokens is None:
            self._tokens = self._memory.read(self._count)
            self._memory.free = True
        return self._tokens

    def host_logits(self) -> torch.Tensor:
        """[rows, vocab] of the rows that do not fit the device, in order; after `token_ids`, and until the next step is started."""
        return self._memory.kept(self._num_kept)


class StepMemories:
    """As many as there are steps in flight at once. A step whose tokens nobody reads keeps its own."""

    def __init__(self, drawn: torch.Tensor) -> None:
        self._drawn = drawn
        self._memories: list[StepMemory] = []

    def take(self) -> StepMemory:
        memory = next((memory for memory in self._memories if memory.free), None)
        if memory is None:
            memory = StepMemory(self._drawn)
            self._memories.append(memory)
        memory.take()
        return memory

    def clear(self) -> None:
        """Steps in flight keep theirs; the next ones get new memory."""
        self._memories.clear()


def _made_event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def draw_rows(logits: torch.Tensor, rows: Sequence[SampleRow], positions: Sequence[int], drawn: torch.Tensor) -> None:
    """Replaces the likeliest tokens, which `drawn` holds already, where one of the first rows wants another and fits the device.

    positions: those of the new tokens.
    """
    if not all(is_likeliest(row) for row in rows):
        draw(logits[: len(rows)], _parameters(rows, positions, logits.device), drawn[: len(rows)])


def is_likeliest(row: SampleRow) -> bool:
    """Whether the likeliest token will do; for a row that the host draws any will."""
    return row.params.is_greedy or not row.fits_device


def parameter_columns(rows: Sequence[SampleRow], positions: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """The columns of DrawParameters.

    A greedy row becomes one in which only the likeliest weigh anything, and of these the first is drawn.
    """
    params = [_LIKELIEST if is_likeliest(row) else row.params for row in rows]
    uniforms = [
        0.0 if is_likeliest(row) else uniform(row.params.seed, position) for row, position in zip(rows, positions, strict=True)
    ]
    return {
        "temperatures": np.array([0.0 if item.is_greedy else item.temperature for item in params], np.float32),
        "top_ks": np.array([0 if item.is_greedy else item.top_k for item in params], np.int32),
        "top_ps": np.array([1.0 if item.is_greedy else item.top_p for item in params], np.float64),
        "min_ps": np.array([item.min_p for item in params], np.float32),
        "uniforms": np.array(uniforms, np.float64),
    }


def _parameters(rows: Sequence[SampleRow], positions: Sequence[int], device: torch.device) -> DrawParameters:
    columns = parameter_columns(rows, positions)
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    any_top_k, any_top_p = bool(columns["top_ks"].any()), bool((columns["top_ps"] < 1.0).any())
    return DrawParameters(**tensors, any_top_k=any_top_k, any_top_p=any_top_p)

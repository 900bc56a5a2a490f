"""Steps of a model as an engine sees them: launched now, complete now on a CPU and some time later on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from llm.batch import SequenceSlice
from llm.sampling import SampledToken, SampleRow, sample

if TYPE_CHECKING:
    from llm.gpu.step import DrawnStep


class StepResult(Protocol):
    """A launched step."""

    def wait(self) -> list[SampledToken]:
        """A token for each row, once the step is complete on the device, K and V of all its tokens included."""
        ...


class Steps(Protocol):
    """How a runner's steps are launched."""

    def overlap(self, rows: Sequence[SampleRow]) -> bool:
        """Whether a step that draws these rows may be launched before the step before it is complete."""
        ...

    def launch(self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow]) -> StepResult:
        """`rows` say how to draw from each slice whose logits are "last", in order. Where sources[i] is not -1, slice i's one token
        is what that row of the step before drew; that step's rows must have been fit to overlap."""
        ...


class Complete:
    """A step that was complete when it was launched."""

    def __init__(self, tokens: list[SampledToken]) -> None:
        self._tokens = tokens

    def wait(self) -> list[SampledToken]:
        return self._tokens


class ForwardRunner(Protocol):
    """What is used of llm.runner.ModelRunner."""

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor: ...


@runtime_checkable
class StartingRunner(Protocol):
    """What is used of llm.gpu.runner.GpuModelRunner beside that."""

    def start_step(self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow]) -> DrawnStep: ...


class HostSteps:
    """Computes and draws at once."""

    def __init__(self, runner: ForwardRunner) -> None:
        self._runner = runner

    def overlap(self, rows: Sequence[SampleRow]) -> bool:
        return False

    def launch(self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow]) -> StepResult:
        logits = self._runner.forward(slices)
        return Complete(sample(logits, rows) if rows else [])


class DeviceSteps:
    """Draws on the device, but for steps with rows that only the host can draw: these are complete when they are launched."""

    def __init__(self, runner: StartingRunner, host: HostSteps) -> None:
        self._runner, self._host = runner, host

    def overlap(self, rows: Sequence[SampleRow]) -> bool:
        return all([row.fits_device for row in rows])

    def launch(self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow]) -> StepResult:
        if not self.overlap(rows):
            assert all(source < 0 for source in sources), "the host does not know these tokens"
            return self._host.launch(slices, sources, rows)
        return _OnDevice(self._runner.start_step(slices, sources, rows))


class _OnDevice:
    def __init__(self, step: DrawnStep) -> None:
        self._step = step

    def wait(self) -> list[SampledToken]:
        return [SampledToken(token) for token in self._step.token_ids()]


def steps_of(runner: ForwardRunner) -> Steps:
    """The way of launching that suits the runner."""
    host = HostSteps(runner)
    return DeviceSteps(runner, host) if isinstance(runner, StartingRunner) else host

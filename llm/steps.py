"""Steps of a model as an engine sees them: launched now, complete now on a CPU and some time later on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from llm.batch import SequenceSlice
from llm.kv.copying import Event
from llm.sampling import SampledToken, SampleRow, sample

if TYPE_CHECKING:
    from llm.gpu.step import DrawnStep


class StepResult(Protocol):
    """A launched step."""

    def wait_filled(self) -> None:
        """Returns once K and V of all its tokens are in the pool, which may be before its tokens are drawn."""
        ...

    def wait(self) -> list[SampledToken]:
        """A token for each row, once the step is complete on the device, K and V of all its tokens included."""
        ...


class Steps(Protocol):
    """How a runner's steps are launched."""

    ahead: bool
    """Whether a step may be launched before the step before it is complete, and before copies that it needs are."""

    def launch(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event] = ()
    ) -> StepResult:
        """`rows` say how to draw from each slice whose logits are "last", in order. Where sources[i] is not -1, slice i's one token
        is what that row of the step before drew; that row must have been one that fits the device. The step begins when `after`
        are passed, and nobody waits for that."""
        ...


class Complete:
    """A step that was complete when it was launched."""

    def __init__(self, tokens: list[SampledToken]) -> None:
        self._tokens = tokens

    def wait_filled(self) -> None:
        pass

    def wait(self) -> list[SampledToken]:
        return self._tokens


class ForwardRunner(Protocol):
    """What is used of llm.runner.ModelRunner."""

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor: ...


@runtime_checkable
class StartingRunner(Protocol):
    """What is used of llm.gpu.runner.GpuModelRunner beside that."""

    def start_step(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event]
    ) -> DrawnStep: ...


class HostSteps:
    """Computes and draws at once."""

    ahead = False

    def __init__(self, runner: ForwardRunner) -> None:
        self._runner = runner

    def launch(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event] = ()
    ) -> StepResult:
        assert not after, "nothing is put off here"
        logits = self._runner.forward(slices)
        return Complete(sample(logits, rows) if rows else [])


class DeviceSteps:
    """Draws on the device, but for rows that only the host can draw, which it does when it waits for their step."""

    ahead = True

    def __init__(self, runner: StartingRunner) -> None:
        self._runner = runner

    def launch(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event] = ()
    ) -> StepResult:
        return _OnDevice(self._runner.start_step(slices, sources, rows, after), rows)


class _OnDevice:
    def __init__(self, step: DrawnStep, rows: Sequence[SampleRow]) -> None:
        self._step, self._rows = step, rows

    def wait_filled(self) -> None:
        self._step.wait_filled()

    def wait(self) -> list[SampledToken]:
        tokens = [SampledToken(token) for token in self._step.token_ids()]
        on_host = [index for index, row in enumerate(self._rows) if not row.fits_device]
        if on_host:
            drawn = sample(self._step.host_logits(), [self._rows[index] for index in on_host])
            for index, token in zip(on_host, drawn, strict=True):
                tokens[index] = token
        return tokens


def steps_of(runner: ForwardRunner) -> Steps:
    """The way of launching that suits the runner."""
    return DeviceSteps(runner) if isinstance(runner, StartingRunner) else HostSteps(runner)

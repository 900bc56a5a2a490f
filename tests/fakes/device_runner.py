"""The fake model on a fake device that does what it was told as late as it can: when somebody waits for it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from llm.kv.copying import Event
from llm.runner import SequenceSlice
from llm.sampling import SampleRow, sample
from llm.sampling_params import SamplingParams
from tests.fakes.runner import FakeRunner

PLAIN = SamplingParams(temperature=0.0)


@dataclass
class FakeDrawnStep:
    """Stands for llm.gpu.step.DrawnStep."""

    runner: "DeviceRunner"
    slices: list[SequenceSlice]
    sources: list[int]
    rows: list[SampleRow]
    after: list[Event]
    drawn: list[int] | None = None
    logits: torch.Tensor | None = None

    def wait_filled(self) -> None:
        self.runner.fill(self)

    def token_ids(self) -> list[int]:
        self.runner.run_until(self)
        assert self.drawn is not None
        return self.drawn

    def host_logits(self) -> torch.Tensor:
        assert self.logits is not None, "ask for the tokens first"
        return self.logits[[not row.fits_device for row in self.rows]]


class DeviceRunner(FakeRunner):
    """Stands for llm.gpu.runner.GpuModelRunner. Steps run in order, each when it or a later one is waited for.

    So a step writes to its blocks as late as a slow device would: if they have been given away by then, somebody's KV is damaged.
    A step that comes after copies waits for these, which `wait_for` stands for.
    """

    wait_for: Callable[[Event], None] = staticmethod(lambda event: None)

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(*args, **named)  # type: ignore[arg-type]
        self._queue: deque[FakeDrawnStep] = deque()
        self._drawn: list[int] = []
        self._on_device: set[int] = set()
        self.most_in_flight = 0

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        if self._queue:
            self.run_until(self._queue[-1])
        return super().forward(slices)

    def start_step(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event] = ()
    ) -> FakeDrawnStep:
        assert len(rows) == sum(piece.logits == "last" for piece in slices)
        kept = [replace(piece, token_ids=list(piece.token_ids), block_ids=list(piece.block_ids)) for piece in slices]
        step = FakeDrawnStep(self, kept, list(sources), list(rows), list(after))
        self._queue.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        return step

    def run_until(self, step: FakeDrawnStep) -> None:
        while step.drawn is None:
            self._fill(self._queue[0])
            self._draw(self._queue.popleft())

    def fill(self, step: FakeDrawnStep) -> None:
        """Until the step's K and V are in the pool; its tokens are not drawn."""
        if step.drawn is None:
            while self._queue[0] is not step:
                self.run_until(self._queue[0])
            self._fill(step)

    def _fill(self, step: FakeDrawnStep) -> None:
        if step.logits is not None:
            return
        for event in step.after:
            self.wait_for(event)
        assert all(source < 0 or source in self._on_device for source in step.sources), "follows what the host draws"
        known = [
            piece if source < 0 else replace(piece, token_ids=[self._drawn[source]])
            for piece, source in zip(step.slices, step.sources, strict=True)
        ]
        step.logits = super().forward(known)

    def _draw(self, step: FakeDrawnStep) -> None:
        logits = step.logits
        assert logits is not None
        ends = [piece.start + len(piece.token_ids) for piece in step.slices if piece.logits == "last"]
        rows = [replace(row, token_ids=range(end)) for row, end in zip(step.rows, ends, strict=True)]
        fit = [replace(row, params=PLAIN, forbidden_token_ids=()) if not row.fits_device else row for row in rows]
        step.drawn = [token.token_id for token in sample(logits, fit)] if rows else []
        self._drawn = step.drawn
        self._on_device = {index for index, row in enumerate(rows) if row.fits_device}

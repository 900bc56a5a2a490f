"""A step in flight: its tokens are drawn on the device, and the host may launch the next step before it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm.ops.gpu.draw import DrawParameters, draw
from llm.sampling import SampleRow, uniform


@dataclass(frozen=True)
class DrawnStep:
    """Tokens on their way to the host."""

    host: torch.Tensor
    """[n] int32; valid once `arrived` has happened."""
    arrived: torch.cuda.Event | None

    def token_ids(self) -> list[int]:
        """Waits for this step only."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.host.tolist()
        return tokens


def draw_rows(logits: torch.Tensor, rows: Sequence[SampleRow], positions: Sequence[int], drawn: torch.Tensor) -> None:
    """Replaces the likeliest tokens, which `drawn` [n] holds already, where a row wants others. position: that of the new token."""
    assert all(row.fits_device for row in rows), "rows for the host must be drawn there"
    if not all(row.params.is_greedy for row in rows):
        draw(logits, _parameters(rows, positions, logits.device), drawn)


def fetch(drawn: torch.Tensor) -> DrawnStep:
    """Begins the copy to the host; later launches on the stream may overwrite `drawn`."""
    if not drawn.is_cuda:
        return DrawnStep(drawn.clone(), None)
    host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
    host.copy_(drawn, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return DrawnStep(host, arrived)


def _parameters(rows: Sequence[SampleRow], positions: Sequence[int], device: torch.device) -> DrawParameters:
    """Greedy rows become top_k = 1, so that one launch serves all."""

    def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    params = [row.params for row in rows]
    uniforms = [uniform(row.params.seed, position) for row, position in zip(rows, positions, strict=True)]
    return DrawParameters(
        temperatures=column([1.0 if item.is_greedy else item.temperature for item in params], torch.float32),
        top_ks=column([1 if item.is_greedy else item.top_k for item in params], torch.int32),
        top_ps=column([item.top_p for item in params], torch.float64),
        min_ps=column([item.min_p for item in params], torch.float32),
        uniforms=column(uniforms, torch.float64),
    )

"""y = x W^T + b, for weights in several formats. Activations and sums are float32, whatever the weights are."""

from __future__ import annotations

from typing import Protocol

import torch


class Linear(Protocol):
    """One weight matrix [out, in], ready to multiply."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] float32 -> [n, out] float32."""
        ...


class TorchLinear:
    """The reference: widens the weights, multiplies with torch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight.to(x.dtype), self._bias)

"""y = gate * sigmoid(gate) * up. Source: Shazeer, GLU Variants Improve Transformer, 2020."""

from __future__ import annotations

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2 f], gate before up -> [n, f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

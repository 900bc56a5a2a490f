"""What a GPU runner is given by its service. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from llm.batch import Batch, Integers
from llm.gpu.tiles import Tiles

if TYPE_CHECKING:
    from llm.ops.gpu.rope import Angles


class Attention(Protocol):
    """Attention over paged K and V. Each service has its own and hands it in."""

    tile_tokens: int
    """New tokens of a sequence that a tile may have."""

    def whole_tokens(self, batch: Batch, pool: torch.Tensor) -> Integers | None:
        """[s], how many of each sequence's new tokens, from its first on, go to Tiles.whole and into no tile; None: none at all."""
        ...

    def __call__(self, qkv: torch.Tensor, tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv [n, (h + 2 kv) d], q already turned, K and V of the new tokens already in the pool -> [n, h d]."""
        ...


@runtime_checkable
class TurningAttention(Attention, Protocol):
    """One that has a launch for the whole of what a new token needs, if there is but one a sequence."""

    def turn_and_attend(self, qkv: torch.Tensor, angles: Angles, tiles: Tiles, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv [n, (h + 2 kv) d] as the projection left it; turns q and k by angles of positions, writes K and V -> [n, h d]."""
        ...


@dataclass(frozen=True)
class GpuSettings:
    """What a GPU needs to know beside RunnerSettings."""

    attention: Attention
    """The service's own kernel."""
    max_batch: int = 0
    """Sequences of the largest decode step that is captured as a graph; 0 captures none (prefill)."""
    max_tokens: int = 0
    """Tokens of the largest prefill step that is captured as a graph; 0 captures none."""
    max_rows: int = 1
    """Most tokens that a step may draw where that is more."""

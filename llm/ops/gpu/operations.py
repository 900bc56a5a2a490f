"""The operations of a model on a GPU: Triton kernels, and torch's matrix product where there are many rows."""

from __future__ import annotations

from typing import cast

import torch

from llm.batch import Batch
from llm.gpu.device_batch import DeviceBatch
from llm.gpu.settings import Attention, TurningAttention
from llm.ops.gpu.embed import embed
from llm.ops.gpu.rms_norm import add_rms_norm, head_norm, rms_norm
from llm.ops.gpu.rope import Angles, KvPlaces, rotate_and_write
from llm.ops.gpu.silu_mul import silu_mul
from llm.ops.gpu.skinny_linear import skinny_linear
from llm.ops.gpu.whole_rows import Around
from llm.ops.linear import Linear
from llm.ops.rope import Rotation

SKINNY_ROWS = 16
"""Up to this many rows our kernel is as fast as the library; measured on an H100 with bench.kernels."""


class GpuLinear:
    """x W^T + b in x's type, or float32 if asked."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, float32: bool) -> None:
        self._weight, self._float32 = weight, float32
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= SKINNY_ROWS:
            return skinny_linear(x, self._weight, Around(bias=self._bias, float32=self._float32))
        if self._float32 and self._bias is None and x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self._weight.T, out_dtype=torch.float32)
        out = torch.nn.functional.linear(x, self._weight, self._bias)
        return out.to(torch.float32) if self._float32 else out


class GpuOperations:
    """Batches are DeviceBatches. Activations have the weights' type; logits are float32."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    head_norm = staticmethod(head_norm)
    silu_mul = staticmethod(silu_mul)

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._turning = attention if isinstance(attention, TurningAttention) else None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, lasting: bool = False) -> Linear:
        """Results that last are logits, and float32."""
        return GpuLinear(weight, bias, float32=lasting)

    def embed(self, table: torch.Tensor, batch: Batch) -> torch.Tensor:
        given = cast(DeviceBatch, batch).on_device
        return embed(table, given["token_ids"], given["sources"], given["drawn"])

    def rotate_and_write(self, qkv: torch.Tensor, rotation: Rotation, batch: Batch, pool: torch.Tensor, layer: int) -> None:
        self._rotate_and_write(qkv, Angles(rotation.cos, rotation.sin), cast(DeviceBatch, batch), pool, layer)

    def turn_and_attend(
        self, qkv: torch.Tensor, angles: Angles, batch: DeviceBatch, pool: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """rotate_and_write, with angles looked up by position, and attention: in one launch, if there is one and it applies."""
        if self._turning is not None and batch.tiles.max_count == 1:
            return self._turning.turn_and_attend(qkv, angles, batch.tiles, pool, layer)
        self._rotate_and_write(qkv, angles, batch, pool, layer)
        return self.attention(qkv, batch, pool, layer)

    def _rotate_and_write(self, qkv: torch.Tensor, angles: Angles, batch: DeviceBatch, pool: torch.Tensor, layer: int) -> None:
        given = batch.on_device
        rotate_and_write(qkv, angles, KvPlaces(given["row_blocks"], given["row_offsets"]), pool, layer)

    def attention(self, qkv: torch.Tensor, batch: Batch, pool: torch.Tensor, layer: int) -> torch.Tensor:
        return self._attention(qkv, cast(DeviceBatch, batch).tiles, pool, layer)

# ruff: noqa: PLR0917
"""The forward pass for a few rows, in six launches a layer (eight for more than one row).

With few rows a step's time is that of reading the weights once, and what costs is every launch between two of those reads. So
norms, residuals and SiLU are folded into the products, and angles are looked up in a table that was made at the start. Beyond
SKINNY_ROWS the library reads narrow matrices faster than our kernel does; the rest stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llm.config import ModelConfig
from llm.gpu.device_batch import DeviceBatch
from llm.ops.gpu.operations import SKINNY_ROWS, GpuOperations
from llm.ops.gpu.rms_norm import head_norm, rms_norm
from llm.ops.gpu.rope import Angles
from llm.ops.gpu.skinny_linear import Around, skinny_linear
from llm.ops.rope import Rotation, make_rotation
from llm.weights_plan import ROPE


@dataclass(frozen=True)
class _Layer:
    """One transformer block's weights; the optional ones are Qwen's."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


_REQUIRED = ("attention_norm", "qkv", "output", "ffn_norm", "gate_up", "down")
_OPTIONAL = ("qkv_bias", "query_norm", "key_norm")


class FewRowsModel:
    """Shares its weights with the Model made from the same tensors, and computes the same function."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], operations: GpuOperations) -> None:
        self._config, self._operations = config, operations
        self._embedding, self._norm = tensors["embedding"], tensors["norm"]
        self._head = tensors["embedding" if config.tie_embeddings else "head"]
        self._layers = [_make_layer(tensors, f"layers.{index}.") for index in range(config.num_layers)]
        self._table: Rotation = make_rotation(tensors[ROPE], torch.arange(config.context_tokens, device=tensors[ROPE].device))

    def forward(self, batch: DeviceBatch, pool: torch.Tensor) -> torch.Tensor:
        """Writes K and V of the batch's tokens into the pool; logits [m, vocab] float32 of its logits_rows."""
        x = self._operations.embed(self._embedding, batch)
        angles = Angles(self._table.cos, self._table.sin, batch.on_device["positions"])
        for index, layer in enumerate(self._layers):
            self._attend(x, layer, index, batch, angles, pool)
            self._feed_forward(x, layer)
        rows = x if len(batch.logits_rows) == x.shape[0] else x[batch.on_device["logits_rows"]]
        return product(rows, self._head, Around(norm=self._norm, eps=self._config.rms_norm_eps, float32=True))

    def _attend(self, x: torch.Tensor, layer: _Layer, index: int, batch: DeviceBatch, angles: Angles, pool: torch.Tensor) -> None:
        config, operations = self._config, self._operations
        qkv = product(x, layer.qkv, Around(norm=layer.attention_norm, eps=config.rms_norm_eps, bias=layer.qkv_bias))
        if layer.query_norm is not None and layer.key_norm is not None:
            head_norm(qkv, layer.query_norm, layer.key_norm, config.rms_norm_eps, config.num_kv_heads)
        operations.turn(qkv, angles, batch, pool, index)
        product(operations.attention(qkv, batch, pool, index), layer.output, Around(residual=x))

    def _feed_forward(self, x: torch.Tensor, layer: _Layer) -> None:
        hidden = product(x, layer.gate_up, Around(norm=layer.ffn_norm, eps=self._config.rms_norm_eps, silu_mul=True))
        product(hidden, layer.down, Around(residual=x))


def product(x: torch.Tensor, weight: torch.Tensor, around: Around) -> torch.Tensor:
    """As skinny_linear, by whichever of it and the library is faster; measured on an H100 with bench.kernels."""
    if x.shape[0] <= SKINNY_ROWS or around.silu_mul or around.float32:
        return skinny_linear(x, weight, around)
    if around.norm is not None:
        x = rms_norm(x, around.norm, around.eps)
    if around.residual is not None:
        return around.residual.addmm_(x, weight.T)
    return torch.nn.functional.linear(x, weight, None if around.bias is None else around.bias.to(weight.dtype))


def _make_layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
    required = (tensors[prefix + name] for name in _REQUIRED)
    optional = (tensors.get(prefix + name) for name in _OPTIONAL)
    return _Layer(*required, *optional)

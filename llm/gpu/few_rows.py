# ruff: noqa: PLR0917
"""The forward pass for a few rows: in decode steps five launches a layer (seven for more than one row), else one more.

With few rows a step's time is that of reading the weights once, and what costs is every launch between two of those reads. So
SiLU is folded into the products, and for a single row norms and residuals are too; angles are looked up in a table that was made at
the start. For several rows a norm is a launch of its own: it adds to the residual what the product before it left, which comes in
parts where programs shared that product's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llm.config import ModelConfig
from llm.gpu.device_batch import DeviceBatch
from llm.ops.gpu.operations import GpuOperations
from llm.ops.gpu.rms_norm import add_rms_norm, head_norm, rms_norm
from llm.ops.gpu.rope import Angles
from llm.ops.gpu.skinny_linear import linear_parts, skinny_linear
from llm.ops.gpu.whole_rows import Around
from llm.ops.rope import Rotation, make_rotation
from llm.weights_plan import ROPE

_LIBRARY_ROWS = range(17, 33)
"""Rows at which the library reads the widest inputs faster than our kernel: 5.58 ms a step of 32 rows, 5.71 without, on an H200."""


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
        """Writes K and V of the batch's tokens into the pool; logits [m, vocab] float32 of its logits_rows, at least one."""
        x = self._operations.embed(self._embedding, batch)
        angles = Angles(self._table.cos, self._table.sin, batch.on_device["positions"])
        return self._one_row(x, batch, angles, pool) if x.shape[0] == 1 else self._several_rows(x, batch, angles, pool)

    def _one_row(self, x: torch.Tensor, batch: DeviceBatch, angles: Angles, pool: torch.Tensor) -> torch.Tensor:
        eps = self._config.rms_norm_eps
        for index, layer in enumerate(self._layers):
            qkv = skinny_linear(x, layer.qkv, Around(norm=layer.attention_norm, eps=eps, bias=layer.qkv_bias))
            attended = self._attend(qkv, layer, index, batch, angles, pool)
            skinny_linear(attended, layer.output, Around(residual=x))
            hidden = skinny_linear(x, layer.gate_up, Around(norm=layer.ffn_norm, eps=eps, silu_mul=True))
            skinny_linear(hidden, layer.down, Around(residual=x))
        return skinny_linear(x, self._head, Around(norm=self._norm, eps=eps, float32=True))

    def _several_rows(self, x: torch.Tensor, batch: DeviceBatch, angles: Angles, pool: torch.Tensor) -> torch.Tensor:
        """What is added to the residual waits in parts for the norm behind it."""
        eps, delta = self._config.rms_norm_eps, None
        for index, layer in enumerate(self._layers):
            qkv = skinny_linear(_normed(x, delta, layer.attention_norm, eps), layer.qkv, Around(bias=layer.qkv_bias))
            delta = linear_parts(self._attend(qkv, layer, index, batch, angles, pool), layer.output)
            hidden = skinny_linear(_normed(x, delta, layer.ffn_norm, eps), layer.gate_up, Around(silu_mul=True))
            delta = _down(hidden, layer.down)
        normed = _normed(x, delta, self._norm, eps)
        rows = normed if len(batch.logits_rows) == x.shape[0] else normed[batch.on_device["logits_rows"]]
        return skinny_linear(rows, self._head, Around(float32=True))

    def _attend(
        self, qkv: torch.Tensor, layer: _Layer, index: int, batch: DeviceBatch, angles: Angles, pool: torch.Tensor
    ) -> torch.Tensor:
        if layer.query_norm is not None and layer.key_norm is not None:
            head_norm(qkv, layer.query_norm, layer.key_norm, self._config.rms_norm_eps, self._config.num_kv_heads)
        return self._operations.turn_and_attend(qkv, angles, batch, pool, index)


def _normed(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight, eps) if delta is None else add_rms_norm(x, delta, weight, eps)


def _down(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Perhaps in parts."""
    return torch.nn.functional.linear(hidden, weight) if hidden.shape[0] in _LIBRARY_ROWS else linear_parts(hidden, weight)


def _make_layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
    required = (tensors[prefix + name] for name in _REQUIRED)
    optional = (tensors.get(prefix + name) for name in _OPTIONAL)
    return _Layer(*required, *optional)

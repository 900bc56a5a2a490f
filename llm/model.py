"""The Llama family's forward pass, written in operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llm.batch import Batch
from llm.config import ModelConfig
from llm.ops.linear import Linear
from llm.ops.operations import Operations
from llm.ops.rope import make_rotation
from llm.weights_plan import ROPE


@dataclass(frozen=True)
class Layer:
    """One transformer block's weights."""

    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Model:
    """Weights and operations together. Holds no state between calls; K and V live in the pool it is given."""

    description = "operation by operation"
    compiles = True

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], operations: Operations) -> None:
        self.config, self._operations = config, operations
        self.layer_done: Callable[[], None] = lambda: None
        """Called once per layer of each step, so that a step that takes long can be told from one that hangs."""
        self._embedding, self._norm, self._frequencies = tensors["embedding"], tensors["norm"], tensors[ROPE]
        self._layers = [_make_layer(tensors, f"layers.{index}.", operations) for index in range(config.num_layers)]
        self._head = operations.linear(tensors["embedding" if config.tie_embeddings else "head"], lasting=True)

    def forward(self, batch: Batch, pool: torch.Tensor, filled: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Writes K and V of the batch's tokens into the pool; logits [m, vocab] float32 of its logits_rows.

        `filled` is called once nothing of what is left to do writes to the pool.
        """
        operations, eps = self._operations, self.config.rms_norm_eps
        rotation = make_rotation(self._frequencies, batch.tensors["positions"].to(self._frequencies.device))
        x = operations.embed(self._embedding, batch)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            norm = layer.attention_norm
            normed = operations.rms_norm(x, norm, eps) if delta is None else operations.add_rms_norm(x, delta, norm, eps)
            qkv = layer.qkv(normed)
            if layer.query_norm is not None and layer.key_norm is not None:
                operations.head_norm(qkv, layer.query_norm, layer.key_norm, eps, self.config.num_kv_heads)
            operations.rotate_and_write(qkv, rotation, batch, pool, index)
            last = index == len(self._layers) - 1
            if last:
                filled()
            if last and not len(batch.logits_rows):
                self.layer_done()
                return torch.empty(0, self.config.vocab_size)
            attended = operations.attention(qkv, batch, pool, index)
            if last:
                x, attended = _wanted_rows(x, batch), _wanted_rows(attended, batch)
            normed = operations.add_rms_norm(x, layer.output(attended), layer.ffn_norm, eps)
            delta = layer.down(operations.silu_mul(layer.gate_up(normed)))
            self.layer_done()
        assert delta is not None
        return self._head(operations.add_rms_norm(x, delta, self._norm, eps))


def _wanted_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows that logits are wanted of: behind the last layer's K and V nobody needs the others."""
    return x if len(batch.logits_rows) == x.shape[0] else x[batch.tensors["logits_rows"].to(x.device)]


def _make_layer(tensors: Mapping[str, torch.Tensor], prefix: str, operations: Operations) -> Layer:
    return Layer(
        attention_norm=tensors[prefix + "attention_norm"],
        qkv=operations.linear(tensors[prefix + "qkv"], tensors.get(prefix + "qkv_bias")),
        query_norm=tensors.get(prefix + "query_norm"),
        key_norm=tensors.get(prefix + "key_norm"),
        output=operations.linear(tensors[prefix + "output"]),
        ffn_norm=tensors[prefix + "ffn_norm"],
        gate_up=operations.linear(tensors[prefix + "gate_up"]),
        down=operations.linear(tensors[prefix + "down"]),
    )

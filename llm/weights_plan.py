"""Which tensors a model is made of, under our names, and which parts of a checkpoint each is fused from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from llm.config import ModelConfig, rope_frequencies
from llm.errors import WeightsError
from llm.weights_packed import Blocks

ROPE = "rope_frequencies"


@dataclass(frozen=True)
class PlannedTensor:
    """`parts` are stacked along the rows. Matrices take the weight format's type, vectors stay float32."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


class Source(Protocol):
    """A checkpoint, addressed by our names of the parts: `embedding`, `layers.3.q`, `layers.3.q_bias`, `rope_factors`."""

    def has(self, part: str) -> bool: ...

    def read(self, part: str) -> torch.Tensor:
        """The part in float32 on the CPU, q and k in the row order of rotate-half RoPE."""
        ...

    def read_blocks(self, part: str) -> Blocks | None:
        """The part as its file has it, in the same order, if that is groups of small integers."""
        ...


def plan_tensors(config: ModelConfig) -> list[PlannedTensor]:
    """Every tensor of the model, in the order in which a forward pass reads them."""
    hidden = config.hidden_size
    planned = [PlannedTensor("embedding", (config.vocab_size, hidden), ("embedding",))]
    for index in range(config.num_layers):
        planned += _plan_layer(config, f"layers.{index}.")
    planned.append(PlannedTensor("norm", (hidden,), ("norm",)))
    if not config.tie_embeddings:
        planned.append(PlannedTensor("head", (config.vocab_size, hidden), ("head",)))
    return planned


def _plan_layer(config: ModelConfig, prefix: str) -> Iterator[PlannedTensor]:
    def planned(name: str, shape: tuple[int, ...], *parts: str) -> PlannedTensor:
        return PlannedTensor(prefix + name, shape, tuple(prefix + part for part in parts or (name,)))

    hidden, head, ffn = config.hidden_size, config.head_dim, config.intermediate_size
    yield planned("attention_norm", (hidden,))
    yield planned("qkv", (config.qkv_size, hidden), "q", "k", "v")
    if config.attention_bias:
        yield planned("qkv_bias", (config.qkv_size,), "q_bias", "k_bias", "v_bias")
    if config.qk_norm:
        yield planned("query_norm", (head,))
        yield planned("key_norm", (head,))
    yield planned("output", (hidden, config.query_size))
    yield planned("ffn_norm", (hidden,))
    yield planned("gate_up", (2 * ffn, hidden), "gate", "up")
    yield planned("down", (hidden, ffn))


def read_planned(planned: PlannedTensor, source: Source) -> torch.Tensor:
    """The fused tensor in float32. Raises WeightsError if the checkpoint's shapes are not the config's."""
    parts = [source.read(part) for part in planned.parts]
    fused = parts[0] if len(parts) == 1 else torch.cat(parts)
    if tuple(fused.shape) != planned.shape:
        raise WeightsError(f"{planned.name}: the checkpoint has shape {tuple(fused.shape)}, the config says {planned.shape}")
    return fused


def rope_tensor(config: ModelConfig, source: Source | None = None) -> torch.Tensor:
    """[head_dim / 2] float32. Some files carry factors that divide the frequencies (Llama 3.1 in GGUF)."""
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float32)
    return frequencies if source is None or not source.has("rope_factors") else frequencies / source.read("rope_factors")

"""A Llama written plainly, in float64, without paging, caching or fusing: what the real one is held against."""

import math
from collections.abc import Mapping

import torch

from llm.config import ModelConfig


def dense_logits(config: ModelConfig, tensors: Mapping[str, torch.Tensor], token_ids: list[int]) -> torch.Tensor:
    """Logits of every position, [n, vocab] float64, from tensors under the names of weights_plan."""
    weights = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    x = weights["embedding"][token_ids]
    for index in range(config.num_layers):
        layer = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{index}.")}
        x = x + attend(config, layer, norm(x, layer["attention_norm"], config), weights["rope_frequencies"]) @ layer["output"].T
        gate, up = (norm(x, layer["ffn_norm"], config) @ layer["gate_up"].T).chunk(2, dim=-1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ layer["down"].T
    return norm(x, weights["norm"], config) @ weights["embedding" if config.tie_embeddings else "head"].T


def norm(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def attend(config: ModelConfig, layer: Mapping[str, torch.Tensor], x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    heads = (x @ layer["qkv"].T + layer.get("qkv_bias", 0)).view(len(x), -1, config.head_dim)
    query, key, value = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    if config.qk_norm:
        query, key = norm(query, layer["query_norm"], config), norm(key, layer["key_norm"], config)
    query, key = rotate(query, frequencies), rotate(key, frequencies)
    results = []
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        scores = query[:, head] @ key[:, kv_head].T / math.sqrt(config.head_dim)
        hidden = torch.ones_like(scores).triu(1).bool()
        results.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[:, kv_head])
    return torch.cat(results, dim=-1)


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    turned = torch.polar(torch.ones_like(angles), angles)[:, None] * torch.complex(*x.chunk(2, dim=-1))
    return torch.cat((turned.real, turned.imag), dim=-1)

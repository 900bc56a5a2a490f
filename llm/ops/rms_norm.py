"""y = x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., d], weight [d] -> [..., d]."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x += delta in place, then rms_norm(x): [n, d], [n, d], [d] -> [n, d]."""
    x += delta
    return rms_norm(x, weight, eps)


def head_norm(qkv: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float, num_kv_heads: int) -> None:
    """Normalises each head of q and k in place (Qwen3): qkv [n, (h + 2 kv) d], norms [d]."""
    heads = qkv.view(qkv.shape[0], -1, query_norm.shape[0])
    num_heads = heads.shape[1] - 2 * num_kv_heads
    heads[:, :num_heads] = rms_norm(heads[:, :num_heads], query_norm, eps)
    heads[:, num_heads:-num_kv_heads] = rms_norm(heads[:, num_heads:-num_kv_heads], key_norm, eps)

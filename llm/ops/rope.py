"""Rotary position embedding, fused with writing K and V into the paged pool.

A head's value pairs (i, i + d/2) turn by position * frequency[i]. Source: Su et al., RoFormer, 2021, in the rotate-half order
of Hugging Face checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm.batch import Batch


@dataclass(frozen=True)
class Rotation:
    """cos and sin of each row's angles, [n, d/2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


def make_rotation(frequencies: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """frequencies [d/2] float32, positions [n]. Angles are taken in float64: in float32 they are off by 1e-3 at 10,000 tokens."""
    angles = positions.to(torch.float64)[:, None] * frequencies.to(torch.float64)
    return Rotation(angles.cos().to(torch.float32), angles.sin().to(torch.float32))


def rotate_and_write(qkv: torch.Tensor, rotation: Rotation, batch: Batch, pool: torch.Tensor, layer: int) -> None:
    """Turns q in place, turns k, and writes k and v of every row into the pool.

    qkv [n, (h + 2 kv) d]; pool [blocks, layers, 2, kv, block_tokens, d] of any float type.
    """
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    turned, values = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    turned.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    blocks, offsets = batch.tensors["row_blocks"], batch.tensors["row_offsets"]
    pool[blocks, layer, 0, :, offsets] = turned[:, -num_kv_heads:].to(pool.dtype)
    pool[blocks, layer, 1, :, offsets] = values.to(pool.dtype)

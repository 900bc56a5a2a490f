"""Attention of new tokens over paged K and V: softmax(q k^T / sqrt(d)) v, causal, grouped query heads.

These are the references; every other implementation is tested against them.
"""

from __future__ import annotations

import torch

from llm.batch import Batch


def gather_sequence(pool: torch.Tensor, layer: int, block_ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, contiguous: [kv, length, d] float32 each."""
    blocks = pool[block_ids, layer].to(torch.float32)
    keys, values = blocks.permute(1, 2, 0, 3, 4).reshape(2, pool.shape[3], -1, pool.shape[5])[:, :, :length]
    return keys, values


def attend_sequence(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """query [m, h, d] of the last m tokens, keys and values [kv, length, d] -> [m, h d]."""
    rows, length = query.shape[0], keys.shape[1]
    mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(rows, -1)


def paged_attention(qkv: torch.Tensor, batch: Batch, pool: torch.Tensor, layer: int) -> torch.Tensor:
    """Every row's attention, whatever the mix of lengths: qkv [n, (h + 2 kv) d], q already turned -> [n, h d].

    K and V of the new tokens are read from the pool too, so that what is attended to is what later steps will see.
    """
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    query = qkv.view(qkv.shape[0], -1, head_dim)[:, : -2 * num_kv_heads]
    out = torch.empty(query.shape[0], query.shape[1] * head_dim, dtype=qkv.dtype, device=qkv.device)
    for sequence in range(len(batch.lengths)):
        rows, block_ids = batch.rows(sequence), torch.from_numpy(batch.blocks(sequence)).to(pool.device, torch.int64)
        keys, values = gather_sequence(pool, layer, block_ids, int(batch.lengths[sequence]))
        out[rows] = attend_sequence(query[rows], keys, values)
    return out

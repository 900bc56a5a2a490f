"""Attention of a fresh prompt's many tokens among themselves by the library (cuDNN), which is well ahead of our kernel there.

The library makes a plan for each number of tokens, which takes it tens of milliseconds; so it is given whole steps of tokens only,
and the kernel takes the rest. K and V are read where the projection left them, turned, so that no page is looked up.
"""

from __future__ import annotations

import numpy as np
import torch

from llm.batch import Batch, Integers

STEP_TOKENS = 1024
"""Plans there may be: one for each multiple up to a step's token budget."""
LEAST_TOKENS = 2048
"""Fewer are no quicker here, and the library's calls cost the host more; see docs/performance-gpu.md."""


def whole_tokens(batch: Batch) -> Integers:
    """[s], how many of each sequence's new tokens, from its first on, the library takes: none after a prefix."""
    counts = np.diff(batch.row_starts)
    fresh = (batch.lengths == counts) & (counts >= LEAST_TOKENS)
    return np.where(fresh, counts // STEP_TOKENS * STEP_TOKENS, 0).astype(np.int32)


def is_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the library has this attention."""
    narrow = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 128
    return device.type == "cuda" and narrow and bool(torch.backends.cudnn.is_available())  # type: ignore[no-untyped-call]


def attend(qkv: torch.Tensor, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Causal attention of one sequence from its first token on: qkv [n, (h + 2 kv) d], q and k turned -> [n, h d]."""
    heads = qkv.view(1, qkv.shape[0], -1, head_dim).transpose(1, 2)
    query, key, value = heads[:, : -2 * num_kv_heads], heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
    if is_available(qkv.device, qkv.dtype, head_dim):
        out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False, 0.0, True, False)[0]
    else:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(qkv.shape[0], -1)

"""The operations that a model is written in. One object holds one implementation of each, and is passed to the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from llm.batch import Batch
from llm.ops.attention import paged_attention
from llm.ops.linear import Linear, TorchLinear
from llm.ops.rms_norm import add_rms_norm, head_norm, rms_norm
from llm.ops.rope import Rotation, rotate_and_write
from llm.ops.silu_mul import silu_mul


class Operations(Protocol):
    """Results may lie in memory that the next call of the same operation reuses; shapes are those of the references."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, lasting: bool = False) -> Linear:
        """`lasting`: the results are the caller's to keep."""
        ...

    def embed(self, table: torch.Tensor, batch: Batch) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def head_norm(
        self, qkv: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float, num_kv_heads: int
    ) -> None: ...

    def rotate_and_write(self, qkv: torch.Tensor, rotation: Rotation, batch: Batch, pool: torch.Tensor, layer: int) -> None: ...

    def attention(self, qkv: torch.Tensor, batch: Batch, pool: torch.Tensor, layer: int) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...


class HostOperations(Operations, Protocol):
    """Operations that the host computes, or orders one by one."""

    def step(self, batch: Batch) -> AbstractContextManager[None]:
        """Wraps one forward pass."""
        ...


class TorchOperations:
    """The references. They run wherever torch does, and serve where nothing faster is installed."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    head_norm = staticmethod(head_norm)
    rotate_and_write = staticmethod(rotate_and_write)
    attention = staticmethod(paged_attention)
    silu_mul = staticmethod(silu_mul)

    def step(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, lasting: bool = False) -> Linear:
        return TorchLinear(weight, bias)

    def embed(self, table: torch.Tensor, batch: Batch) -> torch.Tensor:
        return table[batch.tensors["token_ids"].to(table.device)].to(torch.float32)

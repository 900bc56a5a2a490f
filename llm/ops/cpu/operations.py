"""The model's operations on CPUs, by the kernels of this package and torch's matrix product."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm.batch import Batch
from llm.ops.attention import paged_attention
from llm.ops.cpu import attention, elementwise, linear
from llm.ops.cpu.decode_plan import DecodePlan
from llm.ops.cpu.threads import Threads
from llm.ops.linear import Linear
from llm.ops.rms_norm import head_norm
from llm.ops.rope import Rotation

_KERNEL_ROWS = 96
"""Up to this many rows our kernels are faster than widening the weights and torch's product (measured on Zen 3)."""
_SMALL = 1 << 14
"""Fewer values than this are not worth waking other threads for."""
_LARGEST_NUM_VIEWS = 256

Array = npt.NDArray[Any]


def array_of(tensor: torch.Tensor) -> Array:
    """The same memory as an array; bfloat16 appears as its bits, uint16."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class Workspace:
    """Memory for results, by name, kept between calls: a name's former result is overwritten by its next."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Float32, uninitialised."""
        view = self._views.get((name, shape))
        if view is None:
            view = self._make(name, shape)
        return view

    def _make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        size = int(np.prod(shape))
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.zeros(size)
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
        if len(self._views) >= _LARGEST_NUM_VIEWS:
            self._views.clear()
        view = self._views[name, shape] = self._buffers[name][:size].view(shape)
        return view


class CpuLinear:
    """Few rows go through our kernels; many through torch, over weights widened into scratch memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, workspace: Workspace | None, threads: Threads) -> None:
        self._weight, self._bias, self._workspace, self._threads = weight, bias, workspace, threads
        self._array = array_of(weight)
        self._scratch = workspace or Workspace()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, size = x.shape[0], self._weight.shape[0]
        out = torch.empty(rows, size) if self._workspace is None else self._workspace.take("linear", rows, size)
        if rows <= _KERNEL_ROWS:
            kernel = linear.multiply_one if rows == 1 else linear.multiply_two if rows == 2 else linear.multiply_some
            kernel(x.numpy(), self._array, out.numpy(), self._threads.count)
        else:
            torch.mm(x, self._wide().t(), out=out)
        return out if self._bias is None else out.add_(self._bias)

    def _wide(self) -> torch.Tensor:
        if self._weight.dtype == torch.float32:
            return self._weight
        return self._scratch.take("weight", *self._weight.shape).copy_(self._weight)


class CpuOperations:
    """One engine thread's operations, with the memory that they share. Results last until the same operation runs again."""

    def __init__(self, threads: int) -> None:
        self._threads = Threads(threads)
        self._workspace = Workspace()
        self._plan: DecodePlan | None = None

    def step(self, batch: Batch) -> AbstractContextManager[None]:
        return self._threads.step(len(batch.positions))

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, lasting: bool = False) -> Linear:
        return CpuLinear(weight, bias, None if lasting else self._workspace, self._threads)

    def embed(self, table: torch.Tensor, batch: Batch) -> torch.Tensor:
        out = self._workspace.take("embed", len(batch.token_ids), table.shape[1])
        self._choose(elementwise.embed, out)(array_of(table), batch.token_ids, out.numpy())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = self._workspace.take("norm", *x.shape)
        self._choose(elementwise.rms_norm, x)(x.numpy(), weight.numpy(), np.float32(eps), out.numpy())
        return out

    def add_rms_norm(self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = self._workspace.take("norm", *x.shape)
        self._choose(elementwise.add_rms_norm, x)(x.numpy(), delta.numpy(), weight.numpy(), np.float32(eps), out.numpy())
        return out

    head_norm = staticmethod(head_norm)

    def rotate_and_write(self, qkv: torch.Tensor, rotation: Rotation, batch: Batch, pool: torch.Tensor, layer: int) -> None:
        kernel = self._choose(elementwise.rotate_and_write, qkv)
        cos, sin = rotation.cos.numpy(), rotation.sin.numpy()
        kernel(qkv.numpy(), cos, sin, batch.row_blocks, batch.row_offsets, array_of(pool), layer)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = self._workspace.take("silu", gate_up.shape[0], gate_up.shape[1] // 2)
        self._choose(elementwise.silu_mul, gate_up)(gate_up.numpy(), out.numpy())
        return out

    def attention(self, qkv: torch.Tensor, batch: Batch, pool: torch.Tensor, layer: int) -> torch.Tensor:
        num_kv_heads, size = pool.shape[3], pool.shape[5]
        if size % 16 or pool.shape[4] % 4:
            return paged_attention(qkv, batch, pool, layer)
        heads = qkv.shape[1] // size - 2 * num_kv_heads
        out = self._workspace.take("attention", qkv.shape[0], heads * size)
        queries, results = qkv.numpy().reshape(-1, heads + 2 * num_kv_heads, size), out.numpy().reshape(-1, heads, size)
        if len(batch.single_rows):
            self._decode(queries, results, batch, pool, layer)
        for sequence in batch.chunks:
            rows = batch.rows(sequence)
            keys, values = self._gather(batch, sequence, pool, layer)
            self._attend(queries[rows], results[rows], keys, values, int(batch.lengths[sequence]))
        return out

    def _decode(self, queries: Array, results: Array, batch: Batch, pool: torch.Tensor, layer: int) -> None:
        if self._plan is None or self._plan.batch is not batch:
            self._plan = DecodePlan(batch, pool.shape[3], pool.shape[4], self._threads.count)
        plan, size, group = self._plan, pool.shape[5], results.shape[1] // pool.shape[3]
        scores = self._workspace.take("decode_scores", self._threads.count, 3, plan.split_tokens + 4).numpy()
        sums = self._workspace.take("decode_sums", self._threads.count, 3, size).numpy()
        partial = self._workspace.take("partial", plan.num_partial, group, size + 2).numpy()
        attention.decode_splits(queries, array_of(pool), layer, plan.tasks, batch.block_ids, scores, sums, partial)
        attention.combine_splits(partial, plan.places, plan.rows, pool.shape[3], results)

    def _gather(self, batch: Batch, sequence: int, pool: torch.Tensor, layer: int) -> tuple[Array, Array]:
        length, num_kv_heads, size = int(batch.lengths[sequence]), pool.shape[3], pool.shape[5]
        padded = (length + 15) // 16 * 16
        keys = self._workspace.take("keys", num_kv_heads, size, padded).numpy()
        values = self._workspace.take("values", num_kv_heads, padded, size).numpy()
        attention.gather_chunk(array_of(pool), layer, batch.blocks(sequence), length, keys, values)
        return keys, values

    def _attend(self, queries: Array, results: Array, keys: Array, values: Array, length: int) -> None:
        scratch = self._workspace.take("chunk", self._threads.count, 2, attention.TILE_ROWS, values.shape[2]).numpy()
        scores = self._workspace.take("chunk_scores", self._threads.count, attention.TILE_ROWS, values.shape[1]).numpy()
        attention.attend_chunk(queries, length - len(queries), keys, values, scratch, scores, results)

    def _choose(self, kernels: tuple[Any, Any], values: torch.Tensor) -> Any:
        return kernels[values.numel() >= _SMALL and self._threads.count > 1]

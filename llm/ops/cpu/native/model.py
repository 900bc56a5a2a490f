"""A model whose whole forward pass is native: one call for a step of few rows, one for each layer of a long one."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llm.batch import Batch
from llm.config import ModelConfig
from llm.kv.layout import SCALE_BYTES
from llm.ops.cpu.native import structures
from llm.ops.cpu.native.seats import Seats
from llm.weights_packed import packed_format
from llm.weights_plan import ROPE, plan_tensors

_FEW_ROWS = 64
"""A step of more rows tells of each layer, so that one that takes long can be told from one that hangs."""
_LANES = 16
"""Of the widest instruction set."""
_GRAIN = 32
"""Packed outputs are multiplied in multiples of this many, and up begins where gate ends."""
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_MOST_HEAD_DIM = 512
"""Beyond, a score over KV in int8 would not fit 32 bits."""


def refusal(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Why the native step cannot run a model, for people; None if it can."""
    if config.head_dim > _MOST_HEAD_DIM:
        return f"heads of {config.head_dim} values are longer than {_MOST_HEAD_DIM}"
    if config.head_dim % _LANES:
        return f"heads of {config.head_dim} values are no multiple of {_LANES}"
    packed = any(packed_format(tensors, f"layers.{index}.gate_up") for index in range(config.num_layers))
    if packed and config.intermediate_size % _GRAIN:
        return f"{config.intermediate_size} packed outputs of gate and up are no multiple of {_GRAIN}"
    return None


class NativeModel:
    """Stands in llm.model.Model's place. Holds no state between calls; K and V live in the pool it is given."""

    compiles = False

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        library: ctypes.CDLL,
        threads: int,
        seats: Seats | None = None,
        *,
        rows_in_bytes: bool = False,
    ) -> None:
        """`rows_in_bytes`: four-bit weights multiply rows in 8 bits.

        `seats`: among others on the same cores; a step of few rows looks once who computes too, a long one at each layer.
        """
        self.config, self._library, self._seats, self._threads = config, library, seats, threads
        self.description = f"native {Path(library._name).stem.rpartition('-')[2]}"
        self.layer_done: Callable[[], None] = lambda: None
        self._tensors = dict(tensors)
        self._kernels = {"int8": "int8", "int4": "w4a8" if rows_in_bytes else "int4"}
        self._shapes = {item.name: item.shape for item in plan_tensors(config)}
        self._shapes.setdefault("head", self._shapes["embedding"])
        self._layers = (structures.Layer * config.num_layers)(*map(self._layer, range(config.num_layers)))
        self._model = self._describe()
        self._step = library.tandem_create(ctypes.byref(self._model), threads)
        if not self._step:
            raise MemoryError("the threads of a native step could not be made")
        weakref.finalize(self, library.tandem_destroy, self._step).atexit = False  # a thread may be in a step then

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """Writes K and V of the batch's tokens into the pool; logits [m, vocab] float32 of its logits_rows."""
        with nullcontext() if self._seats is None else self._seats.taken():
            return self._forward(batch, pool)

    def _forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        library, step, num_layers = self._library, self._step, self.config.num_layers
        logits = torch.empty(len(batch.logits_rows), self.config.vocab_size)
        self._share_cores()
        described = _describe_batch(batch), _describe_pool(pool)
        if library.tandem_begin(step, *map(ctypes.byref, described)):
            raise MemoryError(f"no memory for a step of {len(batch.positions)} tokens")
        at_once = num_layers if len(batch.positions) <= _FEW_ROWS else 1
        for first in range(0, num_layers, at_once):
            if first:
                self._share_cores()
            library.tandem_run_layers(step, first, first + at_once)
            self.layer_done()
        library.tandem_finish(step, logits.data_ptr())
        return logits

    def _share_cores(self) -> None:
        if self._seats is not None:
            self._library.tandem_use_threads(self._step, min(self._threads, self._seats.share()))

    def take_phases(self) -> dict[str, float]:
        """Milliseconds of each phase, its barriers included, since the last call."""
        nanoseconds = (ctypes.c_int64 * len(structures.PHASES))()
        self._library.tandem_take_phases(self._step, nanoseconds)
        return {name: value / 1e6 for name, value in zip(structures.PHASES, nanoseconds, strict=True)}

    def _layer(self, index: int) -> structures.Layer:
        prefix = f"layers.{index}."
        vectors = {
            name: self._pointer(prefix + name) for name in ("attention_norm", "query_norm", "key_norm", "qkv_bias", "ffn_norm")
        }
        return structures.Layer(**vectors, **{name: self._matrix(prefix + name) for name in ("qkv", "output", "gate_up", "down")})

    def _describe(self) -> structures.Model:
        config, embedding = self.config, self._tensors["embedding"]
        return structures.Model(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            ffn=config.intermediate_size,
            eps=config.rms_norm_eps,
            embedding_format=structures.FORMATS[_NAMES[embedding.dtype]],
            embedding=embedding.data_ptr(),
            frequencies=self._pointer(ROPE),
            norm=self._pointer("norm"),
            layers=self._layers,
            head=self._matrix("head" if {"head", "head.values"} & self._tensors.keys() else "embedding"),
        )

    def _matrix(self, name: str) -> structures.Matrix:
        outputs, depth = self._shapes[name]
        format = packed_format(self._tensors, name)
        if format is None:
            plain = structures.FORMATS[_NAMES[self._tensors[name].dtype]]
            return structures.Matrix(plain, outputs, depth, values=self._pointer(name))
        parts = {part: self._pointer(f"{name}.{part}") for part in ("values", "scales")}
        return structures.Matrix(structures.FORMATS[self._kernels[format]], outputs, depth, **parts)

    def _pointer(self, name: str) -> int | None:
        tensor = self._tensors.get(name)
        assert tensor is None or tensor.is_contiguous(), f"{name} is not contiguous"
        return None if tensor is None else tensor.data_ptr()


def _describe_pool(pool: torch.Tensor) -> structures.Pool:
    _, layers, _, kv_heads, block_tokens, token_items = pool.shape
    assert pool[0].is_contiguous(), "a block is contiguous"
    head_dim = token_items - (SCALE_BYTES if pool.dtype == torch.int8 else 0)
    token_bytes, block_bytes = (items * pool.itemsize for items in (token_items, pool.stride(0)))
    format = structures.FORMATS[_NAMES[pool.dtype]]
    return structures.Pool(format, layers, kv_heads, block_tokens, head_dim, token_bytes, block_bytes, pool.data_ptr())


def _describe_batch(batch: Batch) -> structures.Batch:
    """Points into the batch's arrays."""
    arrays: dict[str, Any] = {name: getattr(batch, name) for name in structures.BATCH_ARRAYS}
    assert all(array.flags.c_contiguous for array in arrays.values()), "arrays of a batch are contiguous"
    pointers = {name: array.ctypes.data for name, array in arrays.items()}
    return structures.Batch(len(batch.positions), len(batch.lengths), len(batch.logits_rows), 0, **pointers)

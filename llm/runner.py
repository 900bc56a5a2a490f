"""Loads a model and runs batches of token slices over a KV pool. Holds no policy: who runs when is the batchers' affair."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from llm.batch import SequenceSlice, build_batch
from llm.config import ModelConfig, load_model_config
from llm.model import Model
from llm.ops.operations import Operations, TorchOperations
from llm.weights import ModelFiles, Progress, WeightDtype, WeightRequest, load_tensors

__all__ = ["ModelRunner", "RunnerSettings", "SequenceSlice"]


@dataclass(frozen=True)
class RunnerSettings:
    """How one worker computes."""

    role: Literal["prefill", "decode"]
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights, and KV: "float32" is exact with float32 KV; the others have bfloat16 KV."""
    threads: int | None = None
    """CPU threads; None takes every core this process may use."""
    cache_directory: Path = field(default_factory=lambda: Path.home() / ".cache" / "tandem")
    """Where converted weights are kept."""


class Pool(Protocol):
    """What is read of llm.kv.pool.KvPool."""

    @property
    def tensor(self) -> torch.Tensor:
        """[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]"""
        ...


class ModelRunner:
    """One model on one device. Not thread-safe: one engine thread owns it."""

    def __init__(self, model: Model, settings: RunnerSettings, weight_format: WeightDtype) -> None:
        self.config: ModelConfig = model.config
        self.weight_format: str = weight_format
        self.kv_dtype: Literal["float32", "bfloat16"] = "float32" if settings.dtype == "float32" else "bfloat16"
        self._model, self._settings = model, settings
        self._pool: torch.Tensor | None = None

    @classmethod
    def load(cls, files: ModelFiles, settings: RunnerSettings, progress: Progress | None = None) -> ModelRunner:
        """Loads, and converts at the first start. Raises UnsupportedModelError, WeightsError."""
        report = progress or (lambda fraction, text: None)
        config = load_model_config(files.format, files.path, files.random_config)
        operations = _choose_operations(config, settings)
        dtype: WeightDtype = "float32" if settings.dtype == "float32" else "bfloat16"
        tensors = load_tensors(WeightRequest(files, config, dtype, settings.device, settings.cache_directory), report)
        return cls(Model(config, tensors, operations), settings, dtype)

    @property
    def device_description(self) -> str:
        """For people: "cpu (2 threads)"."""
        return f"cpu ({torch.get_num_threads()} threads)"

    def attach(self, pool: Pool) -> None:
        """Sets the KV pool that the following calls write to and read from."""
        self._pool = pool.tensor

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        """Computes the slices' tokens and writes their K and V into the pool.

        Returns float32 logits [rows, vocab]: the rows that the slices ask for, in order of slices and positions.
        """
        assert self._pool is not None, "attach a pool first"
        return self._model.forward(build_batch(slices, self._pool.shape[4]), self._pool)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles and touches what the first requests would otherwise wait for."""


def _choose_operations(config: ModelConfig, settings: RunnerSettings) -> Operations:
    """Compiled kernels where they can be had, the references elsewhere."""
    threads = settings.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if settings.device != "cpu" or importlib.util.find_spec("numba") is None or config.head_dim % 16:
        return TorchOperations()
    from llm.ops.cpu.operations import CpuOperations, set_threads

    set_threads(threads)
    return CpuOperations(threads)

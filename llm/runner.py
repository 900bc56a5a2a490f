"""Loads a model and runs batches of token slices over a KV pool. Holds no policy: who runs when is the batchers' affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from llm.batch import SequenceSlice, build_batch
from llm.config import ModelConfig, load_model_config
from llm.errors import UnsupportedModelError
from llm.gpu.settings import GpuSettings
from llm.host_model import HostModel, SteppedModel, make_host_model, native_library, num_threads
from llm.kv.layout import KvDtype, KvWish
from llm.ops.operations import TorchOperations
from llm.weight_format import Dtype, WeightFormat, WeightWish, has_rows_in_bytes, stored_format, told_format
from llm.weights import DTYPES, ModelFiles, Progress, WeightRequest, load_tensors
from llm.weights_file import lock_file

__all__ = ["ModelRunner", "RunnerSettings", "SequenceSlice"]


@dataclass(frozen=True)
class RunnerSettings:
    """How one worker computes."""

    role: Literal["prefill", "decode"]
    device: str = "cpu"
    dtype: Dtype = "auto"
    weights: WeightWish = "auto"
    weights_reason: str = "set by --weights"
    """Why those, for people."""
    kv_dtype: KvWish = "auto"
    threads: int | None = None
    """CPU threads; None takes every core this process may use."""
    cores: int | None = None
    """Whose time this process gets, alone or with others there; None: all that it may run on."""
    cache_directory: Path = field(default_factory=lambda: Path.home() / ".cache" / "tandem")
    """Where converted weights are kept."""
    gpu: GpuSettings | None = None
    """Given by a service that runs on a GPU; its kernels then do the work."""

    @property
    def told_format(self) -> WeightFormat | None:
        """The weight format that was asked for, or settled on; None leaves it to measurement."""
        return told_format(self.weights, self.dtype)

    @property
    def told_kv_dtype(self) -> KvDtype:
        """What KV is kept in. Follows what was asked for, nothing that is measured: workers of one suite must agree on it."""
        if self.kv_dtype != "auto":
            return self.kv_dtype
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def format_and_reason(self) -> tuple[WeightFormat, str]:
        """What a runner takes; bf16 where nothing was said."""
        if self.told_format is None:
            return "bf16", "the default of this device"
        return self.told_format, "set by --dtype" if self.weights == "auto" else self.weights_reason


class Pool(Protocol):
    """What is read of llm.kv.pool.KvPool."""

    @property
    def tensor(self) -> torch.Tensor:
        """[num_blocks, *KvLayout.block_shape]"""
        ...


class ModelRunner:
    """One model on one device. Not thread-safe: one engine thread owns it."""

    def __init__(self, model: HostModel, settings: RunnerSettings, progress: Progress) -> None:
        self.config: ModelConfig = model.config
        self.weight_format: str
        self.weight_format_reason: str
        """Why this format, for people."""
        self.weight_format, self.weight_format_reason = settings.format_and_reason
        self.kv_dtype = settings.told_kv_dtype
        self._model, self._settings, self._progress = model, settings, progress
        self._pool: torch.Tensor | None = None

    @classmethod
    def load(cls, files: ModelFiles, settings: RunnerSettings, progress: Progress | None = None) -> ModelRunner:
        """Loads, and converts at the first start. Raises UnsupportedModelError, WeightsError."""
        if settings.gpu is not None and cls is ModelRunner:
            from llm.gpu.runner import GpuModelRunner

            return GpuModelRunner.load(files, settings, progress)
        report = progress or (lambda fraction, text: None)
        config = load_model_config(files.format, files.path, files.random_config)
        torch.set_num_threads(num_threads(settings.threads))
        format, _ = settings.format_and_reason
        if format not in DTYPES:
            _check_native(f"--weights {format}", ", ".join(DTYPES), settings, report)
        if settings.told_kv_dtype == "int8":
            _check_native("--kv-dtype int8", "bfloat16, float32", settings, report)
        request = WeightRequest(files, config, stored_format(format), settings.device, settings.cache_directory)
        return cls(_make_model(config, load_tensors(request, report), settings, report), settings, report)

    def adopt_thread(self) -> None:
        """Called first on a thread that is to call `forward`, in place of the thread that did so before."""

    @property
    def device_description(self) -> str:
        """For people: "cpu (2 threads, native avx2; bfloat16 KV)"."""
        return f"cpu ({torch.get_num_threads()} threads, {self._model.description}; {self.kv_dtype} KV)"

    def report_layers(self, layer_done: Callable[[], None]) -> None:
        """Has `layer_done` called once per layer of each step, on the thread that runs it."""
        self._model.layer_done = layer_done

    def attach(self, pool: Pool) -> None:
        """Sets the KV pool that the following calls write to and read from."""
        self._pool = pool.tensor

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        """Computes the slices' tokens and writes their K and V into the pool.

        Returns float32 logits [rows, vocab]: the rows that the slices ask for, in order of slices and positions.
        """
        assert self._pool is not None, "attach a pool first"
        batch = build_batch(slices, self._pool.shape[4])
        return self._model.forward(batch, self._pool)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles kernels and touches the weights. Overwrites the pool's first blocks: call it before any is handed out."""
        assert self._pool is not None, "attach a pool first"
        report = progress or self._progress
        compiles = self._model.compiles
        batches = _warm_up_batches(self.config, self._pool.shape[0], self._pool.shape[4], compiles)
        with _compiling(self._settings, self._progress) if compiles else nullcontext():
            for index, slices in enumerate(batches):
                report(index / len(batches), "preparing kernels")
                self.forward(slices)
        report(1.0, "ready")


def _warm_up_batches(config: ModelConfig, num_blocks: int, block_tokens: int, compiles: bool) -> list[list[SequenceSlice]]:
    """One, two and several sequences of one token, then chunks too long for the kernels of few rows. Where nothing is compiled it
    is enough to touch the weights, with a decode step and a small chunk."""
    capacity = min(config.context_tokens, num_blocks * block_tokens)
    blocks = range(num_blocks)
    single = SequenceSlice([0], 0, blocks)
    counts, sizes = ((1, 2, 3), (8, 64, 512)) if compiles else ((1,), (8,))
    chunks = [SequenceSlice([0] * tokens, 0, blocks) for tokens in sizes if tokens <= capacity]
    return [[single] * count for count in counts] + [[chunk] for chunk in chunks]


def _check_native(asked: str, served: str, settings: RunnerSettings, progress: Progress) -> None:
    """Before weights are converted in vain."""
    with _compiling(settings, progress):
        if settings.device != "cpu" or native_library(settings.cache_directory) is None:
            raise UnsupportedModelError(f"{asked}: there are no kernels for it here; served are {served}")


def _make_model(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], settings: RunnerSettings, progress: Progress
) -> HostModel:
    if settings.device != "cpu":
        return SteppedModel(config, tensors, TorchOperations())
    with _compiling(settings, progress):
        progress(0.0, "preparing kernels")
        format, _ = settings.format_and_reason
        return make_host_model(
            config,
            tensors,
            num_threads(settings.threads),
            settings.cache_directory,
            kv_dtype=settings.told_kv_dtype,
            rows_in_bytes=has_rows_in_bytes(format),
            cores=settings.cores,
        )


def _compiling(settings: RunnerSettings, progress: Progress) -> AbstractContextManager[None]:
    """One process at a time compiles; those that start with it read what it left on disk, and do not disturb its measuring."""
    settings.cache_directory.mkdir(parents=True, exist_ok=True)
    path = settings.cache_directory / "compiling.lock"
    return lock_file(path, lambda: progress(0.0, "waiting for another process that prepares kernels"))

"""The model that a CPU worker runs: native code where it can be built, else operations one by one."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from llm.batch import Batch
from llm.config import ModelConfig
from llm.cores import usable_cores
from llm.errors import UnsupportedModelError
from llm.kv.layout import KvDtype
from llm.model import Model
from llm.ops.operations import HostOperations, TorchOperations

logger = logging.getLogger(__name__)


class HostModel(Protocol):
    """A model whose steps are complete when they return."""

    config: ModelConfig
    description: str
    """How it computes, for people."""
    layer_done: Callable[[], None]
    """Called once per layer of each long step, and at least once a step."""
    compiles: bool
    """Whether the first step of each kind compiles kernels, or reads them from the disk."""

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """Writes K and V of the batch's tokens into the pool; logits [m, vocab] float32 of its logits_rows."""
        ...


class SteppedModel(Model):
    """A model of the host's operations, which are told of each step."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], operations: HostOperations) -> None:
        super().__init__(config, tensors, operations)
        self._host = operations

    def forward(self, batch: Batch, pool: torch.Tensor, filled: Callable[[], None] = lambda: None) -> torch.Tensor:
        with self._host.step(batch):
            return super().forward(batch, pool, filled)


def make_host_model(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    threads: int,
    cache_directory: Path,
    *,
    kv_dtype: KvDtype = "bfloat16",
    cores: int | None = None,
    rows_in_bytes: bool = False,
) -> HostModel:
    """`tensors` as load_tensors gives them. Processes that start together should take turns, since this may compile.

    `cores`: whose time this process gets, to be shared with others that compute there; None: all that it may run on.
    `rows_in_bytes`: four-bit weights multiply rows in 8 bits.

    Raises UnsupportedModelError for packed weights and int8 KV where there is no native step for the model.
    """
    reason = "it cannot be built here"
    library = native_library(cache_directory)
    if library is not None:
        from llm.ops.cpu.native.model import NativeModel, refusal
        from llm.ops.cpu.native.seats import open_seats

        refused = refusal(config, tensors)
        if refused is None:
            seats = open_seats(library, cores or len(usable_cores()))
            return NativeModel(config, tensors, library, threads, seats, rows_in_bytes=rows_in_bytes)
        reason = f"it does not take this model: {refused}"
        logger.info("no native step: %s", reason)
    if any(name.endswith(".values") for name in tensors):
        raise UnsupportedModelError(f"packed weights need the native step: {reason}; take --weights bf16 or fp32")
    if kv_dtype == "int8":
        raise UnsupportedModelError(f"--kv-dtype int8 needs the native step: {reason}; take bfloat16 or float32")
    return SteppedModel(config, tensors, choose_operations(threads))


def native_library(cache_directory: Path) -> ctypes.CDLL | None:
    """None where it cannot be built, which is logged."""
    from llm.ops.cpu.native.library import NativeUnavailableError, load

    try:
        return load(cache_directory)
    except NativeUnavailableError as error:
        logger.warning("no native step, which costs speed and the packed weight formats: %s", error)
        return None


def choose_operations(threads: int) -> HostOperations:
    """Compiled kernels where they can be had, the references elsewhere."""
    if importlib.util.find_spec("numba") is None:
        return TorchOperations()
    from llm.ops.cpu.operations import CpuOperations

    return CpuOperations(threads)


def num_threads(told: int | None) -> int:
    """Every core that this process may use, unless told."""
    return told or len(usable_cores())

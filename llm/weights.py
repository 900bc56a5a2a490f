"""Loads a model's tensors: converted once per machine and weight format, or made from a seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from llm.config import ModelConfig
from llm.errors import UnsupportedModelError
from llm.weight_format import WeightFormat
from llm.weights_file import lock_file, map_tensors, write_tensors
from llm.weights_plan import ROPE, PlannedTensor, Source, plan_tensors, read_planned, rope_tensor

Progress = Callable[[float, str], None]
WeightDtype = Literal["float32", "bfloat16"]
DTYPES: Mapping[WeightFormat, WeightDtype] = {"fp32": "float32", "bf16": "bfloat16"}

_CONVERSION = 1
"""Part of the converted file's name: raise it when the names, order or fusion of tensors change."""
_RANDOM_SCALE = 0.02


class ModelFiles(Protocol):
    """What is read of tandem.models.ModelFiles."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def digest(self) -> str: ...
    @property
    def random_config(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class WeightRequest:
    """Which tensors to load, and whereto."""

    files: ModelFiles
    config: ModelConfig
    dtype: WeightDtype
    device: str
    cache_directory: Path


def load_tensors(request: WeightRequest, progress: Progress) -> dict[str, torch.Tensor]:
    """Every planned tensor and `rope_frequencies`; matrices in `dtype`, vectors in float32.

    Raises UnsupportedModelError, WeightsError.
    """
    if request.files.format == "random":
        progress(0.0, "making random weights")
        return _random_tensors(request)
    path = _converted_path(request)
    if not path.exists():
        _convert(request, path, progress)
    tensors = map_tensors(path)
    return tensors if request.device == "cpu" else {name: tensor.to(request.device) for name, tensor in tensors.items()}


def _converted_path(request: WeightRequest) -> Path:
    digest = re.sub(r"[^A-Za-z0-9]+", "-", request.files.digest)
    return request.cache_directory / "converted" / f"{digest}-{request.dtype}-v{_CONVERSION}.safetensors"


def _convert(request: WeightRequest, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_suffix(".lock"), lambda: progress(0.0, "waiting for another process that converts the weights")):
        if not path.exists():
            planned = plan_tensors(request.config)
            vector = (request.config.head_dim // 2,)
            shapes = {item.name: (item.shape, _dtype(item, request.dtype)) for item in planned} | {ROPE: (vector, torch.float32)}
            write_tensors(path, _converted(request, planned, progress), shapes)


def _converted(request: WeightRequest, planned: list[PlannedTensor], progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    source = _open_source(request)
    for index, item in enumerate(planned):
        progress(index / len(planned), f"converting weights to {request.dtype}")
        yield item.name, read_planned(item, source).to(_dtype(item, request.dtype))
    yield ROPE, rope_tensor(request.config, source)


def _dtype(planned: PlannedTensor, dtype: WeightDtype) -> torch.dtype:
    matrix = torch.float32 if dtype == "float32" else torch.bfloat16
    return matrix if planned.is_matrix else torch.float32


def _open_source(request: WeightRequest) -> Source:
    path, format = request.files.path, request.files.format
    if format == "gguf" and path is not None:
        from llm.gguf_file import open_gguf
        from llm.weights_gguf import GgufSource

        return GgufSource(open_gguf(path), request.config)
    if format == "huggingface" and path is not None:
        from llm.weights_hugging_face import HuggingFaceSource

        return HuggingFaceSource(path)
    raise UnsupportedModelError(f"model format {format!r} with path {path}")


class _NoSource:
    def has(self, part: str) -> bool:
        return False

    def read(self, part: str) -> torch.Tensor:
        raise AssertionError(f"random weights have no {part}")


def _random_tensors(request: WeightRequest) -> dict[str, torch.Tensor]:
    """Seeded by the model's and the tensor's names, so that every worker with the same kind of device has the same weights."""
    tensors = {item.name: _random_tensor(request, item) for item in plan_tensors(request.config)}
    return tensors | {ROPE: rope_tensor(request.config, _NoSource()).to(request.device)}


def _random_tensor(request: WeightRequest, planned: PlannedTensor) -> torch.Tensor:
    dtype = _dtype(planned, request.dtype)
    if planned.name.endswith("norm"):
        return torch.ones(planned.shape, dtype=dtype, device=request.device)
    seed = hashlib.blake2b(f"{request.files.name}/{planned.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(request.device).manual_seed(int.from_bytes(seed, "little") >> 1)
    values = torch.empty(planned.shape, dtype=torch.float32, device=request.device)
    return values.normal_(0.0, _RANDOM_SCALE, generator=generator).to(dtype)

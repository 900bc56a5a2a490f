"""Loads a model's tensors: converted once per machine and weight format, or made from a seed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llm.config import ModelConfig
from llm.errors import UnsupportedModelError, WeightsError
from llm.weight_format import WeightFormat
from llm.weights_file import lock_file, map_tensors, remove_oldest, write_tensors
from llm.weights_packed import Blocks, join_blocks, pack_matrix, packing_version
from llm.weights_plan import ROPE, PlannedTensor, Source, plan_tensors, read_planned, rope_tensor

logger = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
DTYPES: Mapping[WeightFormat, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Formats whose matrices are plain tensors; those of the others are packed."""

_CONVERSION = 2
"""Part of the converted file's name: raise it when the names, order or fusion of tensors change."""
_RANDOM_SCALE = 0.02
_KEPT_BYTES = 16 << 30
"""Converted files of models and formats that were not used for long are removed beyond this."""


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
    format: WeightFormat
    device: str
    cache_directory: Path

    @property
    def is_packed(self) -> bool:
        return self.format not in DTYPES


def load_tensors(request: WeightRequest, progress: Progress) -> dict[str, torch.Tensor]:
    """Every planned tensor and `rope_frequencies`; vectors are float32, matrices what the format says.

    A packed format has the embedding in bfloat16, a matrix `head` of its own, and each matrix in parts (llm.weights_packed).
    Raises UnsupportedModelError, WeightsError.
    """
    if request.files.format == "random":
        progress(0.0, "making random weights")
        return dict(_all_tensors(request, _Seeded(request), lambda fraction, text: None))
    tensors = _mapped(request, progress)
    return tensors if request.device == "cpu" else {name: tensor.to(request.device) for name, tensor in tensors.items()}


def _mapped(request: WeightRequest, progress: Progress) -> dict[str, torch.Tensor]:
    """From the converted file, which is made first if it is missing, and again if it is not whole."""
    identity = _identity(request)
    directory = request.cache_directory / "converted"
    path = directory / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity)}.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_suffix(".lock"), lambda: progress(0.0, "waiting for another process that converts the weights")):
        if (tensors := _intact(path, identity)) is None:
            most = 4 * len(plan_tensors(request.config)) + 8
            write_tensors(path, identity, _all_tensors(request, _Checkpoint(request), progress), most)
            remove_oldest(directory, _KEPT_BYTES, in_use=path)
            tensors = map_tensors(path, identity)
        path.touch()
    return tensors


def _intact(path: Path, identity: str) -> dict[str, torch.Tensor] | None:
    try:
        return map_tensors(path, identity) if path.exists() else None
    except WeightsError as error:
        logger.warning("%s; it is made again", error)
        return None


def _identity(request: WeightRequest) -> str:
    """What a converted file holds: another text for whatever would change a byte of it."""
    packing = f"-{packing_version()}" if request.is_packed else ""
    return f"{request.files.digest}-{request.format}-v{_CONVERSION}{packing}"


def _all_tensors(request: WeightRequest, origin: _Origin, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    planned = plan_tensors(request.config)
    for index, item in enumerate(planned):
        progress(index / len(planned), f"converting weights to {request.format}")
        yield from _converted(request, item, origin)
    yield ROPE, origin.rope()


def _converted(request: WeightRequest, planned: PlannedTensor, origin: _Origin) -> Iterator[tuple[str, torch.Tensor]]:
    values = origin.fused(planned)
    if not planned.is_matrix:
        yield planned.name, values
    elif not request.is_packed:
        yield planned.name, values.to(DTYPES[request.format])
    elif planned.name == "embedding":
        yield planned.name, values.to(torch.bfloat16)
        if request.config.tie_embeddings:
            yield from pack_matrix("head", values, request.format, origin.blocks(planned))
    else:
        yield from pack_matrix(planned.name, values, request.format, origin.blocks(planned))


class _Origin(Protocol):
    """Where the tensors come from, in float32."""

    def fused(self, planned: PlannedTensor) -> torch.Tensor: ...

    def blocks(self, planned: PlannedTensor) -> Blocks | None:
        """The matrix as it was quantised by whoever made the file, if it was so and to what we have kernels for."""
        ...

    def rope(self) -> torch.Tensor: ...


class _Checkpoint:
    """A model's files."""

    def __init__(self, request: WeightRequest) -> None:
        self._config, self._source = request.config, _open_source(request)

    def fused(self, planned: PlannedTensor) -> torch.Tensor:
        return read_planned(planned, self._source)

    def blocks(self, planned: PlannedTensor) -> Blocks | None:
        return join_blocks([self._source.read_blocks(part) for part in planned.parts])

    def rope(self) -> torch.Tensor:
        return rope_tensor(self._config, self._source)


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


class _Seeded:
    """Random: from the model's and the tensor's names, so that workers with the same kind of device have the same weights."""

    def __init__(self, request: WeightRequest) -> None:
        self._request = request

    def fused(self, planned: PlannedTensor) -> torch.Tensor:
        device = self._request.device
        if planned.name.endswith("norm"):
            return torch.ones(planned.shape, device=device)
        seed = hashlib.blake2b(f"{self._request.files.name}/{planned.name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(seed, "little") >> 1)
        values = torch.empty(planned.shape, dtype=torch.float32, device=device)
        return values.normal_(0.0, _RANDOM_SCALE, generator=generator)

    def blocks(self, planned: PlannedTensor) -> None:
        return None

    def rope(self) -> torch.Tensor:
        return rope_tensor(self._request.config).to(self._request.device)

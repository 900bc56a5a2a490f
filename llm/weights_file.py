"""Converted weights on disk: one safetensors file, written tensor by tensor and mapped when read.

Mapping lets two workers on one machine share the pages, and a second start need no time to load.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.errors import WeightsError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Writes beside `path`, then renames, so that a reader sees a whole file or none. `shapes` holds every name, in order."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_header(shapes))
            for (name, tensor), (expected, (shape, dtype)) in zip(tensors, shapes.items(), strict=True):
                assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype)
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors over a private mapping: pages are shared with every process that maps the file. Raises WeightsError."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")
        length = int.from_bytes(content[:8].tobytes(), "little")
        entries = json.loads(content[8 : 8 + length].tobytes())
        data = torch.from_numpy(content[8 + length :])
        return {name: _tensor(data, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a readable weights file ({error}); delete it to have it made again") from error


def _tensor(data: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    start, end = entry["data_offsets"]
    return data[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


@contextlib.contextmanager
def lock_file(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock between processes; calls `waiting` once if another one has it. Gone with the process."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

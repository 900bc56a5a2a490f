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

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64
_ENTRY_BYTES = 160
"""Room in the header for one tensor's entry: it is written after the tensors, whose shapes are not known before."""
_IDENTITY = "tandem"


def write_tensors(path: Path, identity: str, tensors: Iterable[tuple[str, torch.Tensor]], most: int) -> None:
    """Writes beside `path`, then renames, so that a reader sees a whole file or none. `most` tensors at most.

    `identity` says what the file holds; who reads it asks for the same.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    room = -(-(most + 2) * _ENTRY_BYTES // _ALIGNMENT) * _ALIGNMENT
    entries: dict[str, Any] = {"__metadata__": {_IDENTITY: identity}}
    try:
        with partial.open("wb") as file:
            file.seek(room)
            for name, tensor in _aligned_first(tensors):
                start = file.tell() - room
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                span = [start, file.tell() - room]
                entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            file.seek(0)
            file.write(_header(entries, room))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _aligned_first(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those whose size would leave the next one unaligned come last: the format has no gaps."""
    odd = []
    for name, tensor in tensors:
        if tensor.nbytes % _ALIGNMENT:
            odd.append((name, tensor))
        else:
            yield name, tensor
    yield from odd


def _header(entries: dict[str, Any], room: int) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode().ljust(room - 8)
    assert len(text) == room - 8, "more tensors, or longer names, than was said"
    return len(text).to_bytes(8, "little") + text


def map_tensors(path: Path, identity: str) -> dict[str, torch.Tensor]:
    """Tensors over a private mapping: pages are shared with every process that maps the file.

    Raises WeightsError for a file that is cut off, or holds something else than `identity`.
    """
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")
        length = int.from_bytes(content[:8].tobytes(), "little")
        entries = json.loads(content[8 : 8 + length].tobytes())
        found = entries.pop("__metadata__")[_IDENTITY]
        data = torch.from_numpy(content[8 + length :])
        if found != identity or data.numel() != max(entry["data_offsets"][1] for entry in entries.values()):
            raise WeightsError(f"{path}: holds {found!r} in {data.numel()} bytes, not a whole {identity!r}")
        return {name: _tensor(data, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise error if isinstance(error, WeightsError) else WeightsError(f"{path}: not a readable weights file: {error}") from error


def _tensor(data: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    start, end = entry["data_offsets"]
    return data[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def remove_oldest(directory: Path, keep_bytes: int, in_use: Path) -> None:
    """Removes the weights files that were used longest ago until the rest have at most `keep_bytes`; never `in_use`.

    A process that has one mapped keeps it. Two that clean up at once do no harm.
    """
    kept_bytes = 0
    for path in sorted(directory.glob("*.safetensors"), key=_last_used, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            kept_bytes += path.stat().st_size
            if kept_bytes > keep_bytes and path != in_use:
                path.unlink()
                path.with_suffix(".lock").unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    """Opening a file for use sets its time of change."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


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

"""Reads a GGUF file's header: metadata and where its tensors lie. Needs neither torch nor the gguf library.

Written by hand, since the library takes seconds to walk the vocabulary, which a worker never looks at.
Source: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST_KEPT_ARRAY = 1024
_LARGEST_COUNT = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is rows first; `offset` counts bytes from the file's start; `kind` is GGML's type number."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """A file's header. Arrays longer than 1,024 items (the vocabulary) are left out of `metadata`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Raises WeightsError if the file cannot be read or is no GGUF file of version 2 or 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).read()
    except (OSError, ValueError, struct.error, OverflowError, RecursionError) as error:
        raise error if isinstance(error, WeightsError) else WeightsError(f"{path}: not a readable GGUF file: {error}") from error


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._position = path, content, 0

    def read(self) -> GgufFile:
        magic, version, num_tensors, num_values = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightsError(f"{self._path}: expected a GGUF file of version 2 or 3")
        if num_tensors > _LARGEST_COUNT or num_values > _LARGEST_COUNT:
            raise WeightsError(f"{self._path}: {num_tensors} tensors and {num_values} values are more than any model has")
        metadata = dict(self._pair() for _ in range(num_values))
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = int(metadata.get("general.alignment", 32))
        base = -(-self._position // alignment) * alignment
        placed = {name: GgufTensor(info.shape, info.kind, info.offset + base) for name, info in tensors.items()}
        return GgufFile(self._path, {key: value for key, value in metadata.items() if value is not None}, placed)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._content, self._position)
        self._position += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._position
        self._skip(length)
        return self._content[start : self._position].decode("utf-8", errors="replace")

    def _skip(self, length: int) -> None:
        if self._position + length > len(self._content):
            raise WeightsError(f"{self._path}: ends within its header")
        self._position += length

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        (kind,) = self._unpack("I")
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise WeightsError(f"{self._path}: metadata of unknown type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _array(self) -> list[Any] | None:
        kind, count = self._unpack("IQ")
        if count <= _LARGEST_KEPT_ARRAY:
            return [self._value(kind) for _ in range(count)]
        if kind in _SCALARS:
            self._skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            self._skip_strings(count)
        else:
            raise WeightsError(f"{self._path}: an array of {count} values of type {kind}")
        return None

    def _skip_strings(self, count: int) -> None:
        content, position, limit = self._content, self._position, len(self._content)
        for _ in range(count):
            position += 8 + int.from_bytes(content[position : position + 8], "little")
            if position > limit:
                raise WeightsError(f"{self._path}: ends within its header")
        self._position = position

    def _tensor(self) -> tuple[str, GgufTensor]:
        name = self._string()
        (num_dimensions,) = self._unpack("I")
        if num_dimensions > 4:
            raise WeightsError(f"{self._path}: tensor {name} has {num_dimensions} dimensions")
        dimensions = self._unpack(f"{num_dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, GgufTensor(tuple(reversed(dimensions)), kind, offset)

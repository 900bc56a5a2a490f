"""Digests of files: the exact one, and a fast one that samples.

The fast one reads at most ~400 KiB of a file, so that a worker knows in milliseconds whether it holds the same weights as its
peers. It tells models apart; it is no protection against somebody who crafts a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_WHOLE_BYTES = 1 << 18
_EDGE_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 12
_NUM_SAMPLES = 64


def sha256_file(path: Path) -> str:
    """The SHA-256 of all of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(paths: Iterable[Path], *, named: bool) -> str:
    """A 128-bit digest of sizes and samples of `paths`, in order; `named` adds their names. Same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode() if named else b"")
        _add_file(digest, path)
    return f"sampled:{digest.hexdigest()}"


def fingerprint_value(label: str, value: str | Mapping[str, Any]) -> str:
    """A 128-bit digest of a text or a JSON-like mapping, under a label that keeps kinds apart."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    digest = hashlib.blake2b(f"{label}={text}".encode(), digest_size=16)
    return f"{label}:{digest.hexdigest()}"


def _add_file(digest: hashlib.blake2b, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for offset, length in _sampled_ranges(size):
            file.seek(offset)
            digest.update(file.read(length))


def _sampled_ranges(size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is read: everything of a small file; head, tail and evenly spaced samples of a large one."""
    if size <= _WHOLE_BYTES:
        return [(0, size)]
    spacing = (size - _SAMPLE_BYTES) // (_NUM_SAMPLES + 1)
    samples = [(spacing * (number + 1), _SAMPLE_BYTES) for number in range(_NUM_SAMPLES)]
    return [(0, _EDGE_BYTES), *samples, (size - _EDGE_BYTES, _EDGE_BYTES)]

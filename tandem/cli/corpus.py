"""A text to measure models with. None is shipped: what every Python brings, else what Debian brings."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tandem.cli.terminal import CommandError

_LICENCES = Path("/usr/share/common-licenses")


@dataclass(frozen=True)
class Corpus:
    """A text, and what it is, for people."""

    name: str
    text: str


def read_corpus(path: Path) -> Corpus:
    """Raises CommandError."""
    try:
        return Corpus(path.name, path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise CommandError(f"The text {path} cannot be read: {error.strerror}.") from error


def find_corpus(licences: Path = _LICENCES, topics_module: str = "pydoc_data.topics") -> Corpus:
    """Raises CommandError if there is none on this machine."""
    text = "\n".join(_topics(topics_module))
    if text:
        return Corpus("Python's language reference (pydoc topics)", text)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(licences.glob("*")) if not path.is_symlink()]
    if texts:
        return Corpus(f"the licences in {licences}", "\n".join(texts))
    raise CommandError(
        f"This machine has no text to measure with: Python came without {topics_module}, and {licences} is empty or missing.",
        "Give one with --text FILE; some 20 kB of plain text will do.",
    )


def _topics(module: str) -> Iterator[str]:
    """What help() shows on the language: sections of its reference, by name."""
    try:
        topics: dict[str, str] = importlib.import_module(module).topics
    except ImportError:
        return
    yield from (topics[name] for name in sorted(topics))

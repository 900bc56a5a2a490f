"""Reads the metadata of a GGUF file, vocabulary included, through the gguf library.

That takes seconds and some 200 MB, so no process that goes on living may import this: see gguf_conversion.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from tandem.models import ModelError


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata by key. Raises ModelError if the file cannot be read or is no GGUF file that the library knows."""
    try:
        fields = GGUFReader(path).fields
        return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # the library trusts the file: a damaged one may raise anything
        raise ModelError(f"not a readable GGUF file: {error}") from error

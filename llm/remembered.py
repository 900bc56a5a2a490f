"""What was measured once on this machine, kept as JSON."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured = TypeVar("Measured", bound="DataclassInstance")


def remembered(path: Path, read: Callable[[dict[str, Any]], Measured], measure: Callable[[], Measured]) -> Measured:
    """What `path` holds, else what is measured, which it holds from then on; a reader sees all of it or nothing.

    A file that `read` cannot make sense of (ValueError, KeyError, TypeError) is measured again and replaced.
    """
    try:
        return read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(asdict(found)))
    written.replace(path)
    return found

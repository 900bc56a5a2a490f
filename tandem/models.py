"""Which model is meant by a name, where its files are, and how two processes know that they hold the same one."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.downloads import PINNED_MODELS, PROVIDED, ModelError, NotFetchedError, PinnedModel, Progress, pull_hub, pull_pinned
from tandem.fingerprints import fingerprint_files, fingerprint_value
from tandem.random_models import RANDOM_MODELS

__all__ = [
    "DEFAULT_MODEL",
    "PINNED_MODELS",
    "RANDOM_MODELS",
    "ModelError",
    "ModelFiles",
    "NotFetchedError",
    "Progress",
    "cache_directory",
    "resolve_model",
    "writable_cache_directory",
]

DEFAULT_MODEL = "smollm2-135m-instruct"

ModelFormat = Literal["gguf", "huggingface", "random"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_RANDOM_PREFIX = "random:"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model that is present on this machine.

    `path` is the .gguf file, or the directory with config.json, safetensors and tokenizer.json; None for random weights, whose
    shape `random_config` gives. Equal digests mean equal weights and config; equal tokenizer digests mean equal tokenizers.
    """

    name: str
    format: ModelFormat
    path: Path | None
    digest: str
    tokenizer_digest: str
    random_config: Mapping[str, Any] | None = None


def cache_directory() -> Path:
    """Where Tandem keeps models and logs: TANDEM_CACHE_DIR, else $XDG_CACHE_HOME/tandem, else ~/.cache/tandem."""
    if chosen := os.environ.get("TANDEM_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "tandem"


def writable_cache_directory() -> Path:
    """The same, made if need be. Raises ModelError where nothing can be written to it."""
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError("not writable by this user")
    except OSError as error:
        message = f"Cannot write to the cache directory {directory}: {error}. Set TANDEM_CACHE_DIR to a writable directory."
        raise ModelError(message) from error
    return directory


def loading_failure(error: OSError) -> str:
    """What a person is told when a model's files cannot be read, or what is made of them cannot be kept."""
    message = f"the model cannot be loaded: {error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return message
    kept = f"Converted weights and compiled code are kept in {cache_directory()}"
    return f"{message}. {kept}: make room there, or name another folder in TANDEM_CACHE_DIR."


def resolve_model(name: str, *, download: bool = True, progress: Progress | None = None) -> ModelFiles:
    """Find a model by name, fetching it if need be.

    Names: a pinned name ("smollm2-135m-instruct"), "random:tiny", a path to a .gguf file or a Hugging Face directory, or a hub name
    "org/name". Blocks; may take minutes when it downloads. Raises ModelError, whose text says what to do.
    """
    report = progress or _no_progress
    if name in PINNED_MODELS:
        return _pinned(PINNED_MODELS[name], download, report)
    if name.startswith(_RANDOM_PREFIX):
        return _random(name)
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(path.resolve())
    if _HUB_NAME.fullmatch(name) and not name.endswith(".gguf"):
        return _hugging_face(name, pull_hub(name, cache_directory(), download, report))
    raise ModelError(_unknown(name))


def _no_progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    _log.debug("%s: %d of %s bytes", stage, done_bytes, total_bytes)


def _pinned(model: PinnedModel, download: bool, report: Progress) -> ModelFiles:
    path = pull_pinned(model, cache_directory(), download=download, progress=report)
    digest = f"sha256:{model.sha256}"
    return ModelFiles(model.name, "gguf", path, digest, fingerprint_value("tokenizer", digest))


def _random(name: str) -> ModelFiles:
    config = RANDOM_MODELS.get(name.removeprefix(_RANDOM_PREFIX))
    if config is None:
        raise ModelError(_unknown(name))
    tokenizer_digest = fingerprint_value("byte-level", str(config["vocab_size"]))
    return ModelFiles(name, "random", None, fingerprint_value("random", config), tokenizer_digest, config)


def _local(path: Path) -> ModelFiles:
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    if path.is_dir():
        return _hugging_face(path.name, path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file. Give a .gguf file or a directory with config.json and safetensors.")
    digest = fingerprint_files([path], named=False)
    return ModelFiles(path.stem, "gguf", path, digest, fingerprint_value("tokenizer", digest))


def _only_gguf(directory: Path) -> Path:
    found = sorted(directory.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    problem = "several .gguf files; name one of them" if found else "neither config.json nor a .gguf file"
    raise ModelError(f"The directory {directory} has {problem}.")


def _hugging_face(name: str, directory: Path) -> ModelFiles:
    tokenizers = [directory / file for file in _TOKENIZER_FILES if (directory / file).is_file()]
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"The model directory {directory} has no tokenizer.json.")
    digest = fingerprint_files([directory / "config.json", *_weights(directory)], named=True)
    return ModelFiles(name, "huggingface", directory, digest, fingerprint_files(tokenizers, named=True))


def _weights(directory: Path) -> list[Path]:
    """The safetensors files, complete: a half-copied directory must fail here and not in the middle of loading."""
    found = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    missing = sorted(wanted - {path.name for path in found})
    if missing or not found:
        raise ModelError(f"The model directory {directory} lacks weights: {', '.join(missing) or '*.safetensors'}.")
    return found


def _unknown(name: str) -> str:
    known = [*PINNED_MODELS, *(_RANDOM_PREFIX + shape for shape in RANDOM_MODELS)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"No model {name!r}.{hint} Known names: {', '.join(known)}; or {PROVIDED}."

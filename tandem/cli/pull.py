"""`tandem pull`, and the progress bar that other commands share."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.text import Text

from tandem.cli.client import exit_on_error
from tandem.cli.terminal import notes, output
from tandem.downloads import pull_pinned
from tandem.models import PINNED_MODELS, ModelFiles, cache_directory, resolve_model


class DownloadBar:
    """Shows a model's progress: a bar where bytes are known and the terminal can draw one, else a line per stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage != self._stage:
            self._begin(stage, total_bytes)
        if self._task is not None:
            self._bar.update(self._task, completed=done_bytes)

    def _begin(self, stage: str, total_bytes: int | None) -> None:
        self._stage = stage
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if total_bytes is not None and self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total_bytes)
        else:
            self._console.print(Text(f"{stage} …", style="dim"), soft_wrap=True)


def fetch(model: str) -> ModelFiles:
    """Resolve a model with a progress bar. Raises ModelError."""
    with DownloadBar(notes()) as bar:
        return resolve_model(model, progress=bar)


def run_pull(model: str) -> None:
    with exit_on_error():
        started = time.monotonic()
        files = _fetch_thoroughly(model)
        place = files.path or "made from a seed when it is loaded; nothing to fetch"
        output().print(Text(f"{files.name}: {place}"), soft_wrap=True)
        notes().print(Text(f"{files.digest} · {time.monotonic() - started:.1f} s", style="dim"), soft_wrap=True)


def _fetch_thoroughly(model: str) -> ModelFiles:
    """As `fetch`, but a file that lies in the cache is read to its last byte, whatever was verified before."""
    if model in PINNED_MODELS:
        with DownloadBar(notes()) as bar:
            pull_pinned(PINNED_MODELS[model], cache_directory(), download=True, progress=bar, thorough=True)
    return fetch(model)

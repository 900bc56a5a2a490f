"""`tandem eval`: what formats of weights and KV cost, measured on a text.

The work is done in two processes that end: one for the tokens and one for the model, since this one has neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tandem.cli.client import exit_on_error
from tandem.cli.corpus import Corpus, find_corpus, read_corpus
from tandem.cli.pull import fetch
from tandem.cli.terminal import CommandError, notes, output
from tandem.compute import num_threads, prepare_compute
from tandem.worker_settings import WeightSettings

_BYTES_A_TOKEN = 8
"""More than any tokenizer in use needs for a token of ordinary text, so that enough of the text is cut into tokens."""


@dataclass(frozen=True)
class EvalOptions:
    """What `tandem eval` was told. `weights`: formats, or pairs of prefill/decode."""

    model: str
    weights: tuple[str, ...]
    text: Path | None = None
    num_tokens: int = 4096
    window_tokens: int = 512
    kv_dtype: str = "auto"
    threads: int | None = None
    as_json: bool = False

    @property
    def compute(self) -> WeightSettings:
        return WeightSettings(threads=self.threads or 0)


def run_eval(options: EvalOptions) -> None:
    with exit_on_error():
        corpus = find_corpus() if options.text is None else read_corpus(options.text)
        fetch(options.model)
        prepare_compute(options.compute)
        tokens = _tokens(options, corpus)
        results = list(_results(options, tokens))
        about = {"model": options.model, "text": corpus.name, "tokens": len(tokens), "window": options.window_tokens}
        about["kv_dtype"] = options.kv_dtype
        if options.as_json:
            output().out(json.dumps({**about, "results": results}, indent=2))
        else:
            output().print(_table(about, results))


def _tokens(options: EvalOptions, corpus: Corpus) -> list[int]:
    text = corpus.text.encode()[: options.num_tokens * _BYTES_A_TOKEN]
    done = subprocess.run((*_module("gateway.token_ids"), "--model", options.model), input=text, capture_output=True, check=False)
    if done.returncode:
        raise CommandError(f"The text cannot be cut into tokens: {_last_line(done.stderr)}")
    tokens: list[int] = json.loads(done.stdout)[: options.num_tokens]
    if len(tokens) < options.window_tokens:
        raise CommandError(
            f"{corpus.name} gives {len(tokens)} tokens, fewer than a window of {options.window_tokens}.",
            "Give a longer text with --text, more --tokens, or a shorter --window.",
        )
    return tokens


def _results(options: EvalOptions, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    flags = ("--model", options.model, "--window", str(options.window_tokens), "--threads", str(num_threads(options.compute)))
    command = (*_module("decode_svc.verify_quality"), *flags, "--kv-dtype", options.kv_dtype, "--weights", *options.weights)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
        given.write(json.dumps(tokens).encode())
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=complaints) as child:
            try:
                yield from _followed(child.stdout, len(options.weights))
                child.wait()
            finally:
                child.kill()  # for when this command is interrupted
        if child.returncode:
            complaints.seek(0)
            raise CommandError(f"The comparison failed: {_last_line(complaints.read())}")


def _followed(lines: Any, num_formats: int) -> Iterator[dict[str, Any]]:
    """Results as they come; progress goes to a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=notes(), transient=True) as bar:
        task = bar.add_task(f"comparing {num_formats} with fp32", total=1.0)
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                bar.update(task, completed=message["progress"])
            else:
                yield message


def _table(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> Table:
    kept = "" if about["kv_dtype"] == "auto" else f", KV in {about['kv_dtype']}"
    title = f"{about['model']}{kept} against its file in fp32: {about['tokens']} tokens of {about['text']}"
    caption = "change: of the perplexity; agreement: same likeliest token; KL: nats a token, from fp32"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("weights", "role", "perplexity", "change", "agreement", "KL"):
        table.add_column(heading, justify="left" if heading in ("weights", "role") else "right")
    for result in results:
        for role in ("prefill", "decode"):
            table.add_row(result["weights"] if role == "prefill" else "", role, *_cells(result[role]))
    return table


def _cells(figures: dict[str, float]) -> Iterator[str]:
    yield f"{figures['perplexity']:.3f}"
    yield f"{100 * (figures['perplexity_ratio'] - 1):+.2f} %"
    yield f"{100 * figures['agreement']:.1f} %"
    yield f"{figures['divergence']:.5f}"


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _last_line(stderr: bytes) -> str:
    return (stderr.decode(errors="replace").strip().splitlines() or ["it ended without a word"])[-1]

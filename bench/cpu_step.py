"""Where the time of a native CPU step goes: `python -m bench.cpu_step [--weights int4] [--kv-dtypes int8] [--decode 1 16] ...`.

Prints the median step, and the first thread's milliseconds of each phase over all layers; its waits for other threads count with
the work by rows (norm, rope, prepare). What is left is Python and the library's entry. Nothing else should run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from bench.options import new_parser
from llm.batch import SequenceSlice, build_batch
from llm.config import load_model_config
from llm.host_model import make_host_model
from llm.kv.layout import KvDtype, KvLayout, KvWish
from llm.kv.pool import blocks_in
from llm.ops.cpu.native.model import NativeModel
from llm.weight_format import FORMATS, WeightFormat, has_rows_in_bytes, stored_format
from llm.weights import WeightRequest, load_tensors
from tandem.cores import num_usable_cores
from tandem.models import DEFAULT_MODEL, cache_directory, resolve_model

_PAGE = 16
_FILLED_TOGETHER = 16
"""Blocks, by a prompt."""
_REPEATS_S = 1.5
"""Each case is repeated this long, three times at least."""


@dataclass(frozen=True)
class Steps:
    """Batch sizes of decode steps with `context` tokens each, and tokens of prompts."""

    model: str
    threads: int
    context: int = 256
    decode: tuple[int, ...] = (1, 16)
    prefill: tuple[int, ...] = (512, 2048)
    kv_dtype: KvDtype = "bfloat16"


@dataclass(frozen=True)
class Figure:
    """One case; milliseconds. `phases` are means, scaled so that they are parts of the median."""

    name: str
    median: float
    least: float
    phases: dict[str, float]

    @property
    def outside(self) -> float:
        return max(0.0, self.median - sum(self.phases.values()))


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    for format, kv_dtype in itertools.product(options.weights, options.kv_dtypes):
        steps = Steps(options.model, options.threads, options.context, tuple(options.decode), tuple(options.prefill), kv_dtype)
        title = f"{options.model}, {format} weights, {kv_dtype} KV, {options.threads} threads"
        _print_table(title, measure_steps(steps, format))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("cpu_step", "Times the phases of native steps on a CPU.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name, path or hub name")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=["int4"], help="weight formats")
    parser.add_argument("--kv-dtypes", nargs="+", choices=get_args(KvWish)[1:], default=["bfloat16"], help="what KV is kept in")
    parser.add_argument("--threads", type=int, default=num_usable_cores(), help="that compute together")
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 16], help="batch sizes of decode steps")
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence that decodes")
    parser.add_argument("--prefill", nargs="*", type=int, default=[512], help="tokens of prompts")
    return parser.parse_args(argv)


def measure_steps(steps: Steps, format: WeightFormat) -> list[Figure]:
    """Decode steps first."""
    model, pool = _load(steps, format)
    cases = {f"decode {batch}": _decode(batch, steps.context) for batch in steps.decode}
    cases |= {f"prefill {tokens}": _prefill(tokens) for tokens in steps.prefill}
    return [_measure(model, pool, name, slices) for name, slices in cases.items()]


def _load(steps: Steps, format: WeightFormat) -> tuple[NativeModel, torch.Tensor]:
    files = resolve_model(steps.model)
    config = load_model_config(files.format, files.path, files.random_config)
    tensors = load_tensors(WeightRequest(files, config, stored_format(format), "cpu", cache_directory()), lambda *_: None)
    model = make_host_model(config, tensors, steps.threads, cache_directory(), rows_in_bytes=has_rows_in_bytes(format))
    assert isinstance(model, NativeModel), "there is no native step here"
    num_blocks = max([-(-steps.context // _PAGE) * batch for batch in steps.decode] + [-(-n // _PAGE) for n in steps.prefill])
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, _PAGE, steps.kv_dtype)
    pool = blocks_in(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8), layout)
    for first in range(0, num_blocks, _FILLED_TOGETHER):
        model.forward(build_batch([_filling(range(first, min(first + _FILLED_TOGETHER, num_blocks)))], _PAGE), pool)
    return model, pool


def _filling(blocks: range) -> SequenceSlice:
    return SequenceSlice(range(100, 100 + len(blocks) * _PAGE), 0, blocks, "none")


def _decode(batch: int, context: int) -> list[SequenceSlice]:
    blocks = -(-context // _PAGE)
    return [SequenceSlice([5 + index], context - 1, range(index * blocks, (index + 1) * blocks)) for index in range(batch)]


def _prefill(tokens: int) -> list[SequenceSlice]:
    return [SequenceSlice(range(100, 100 + tokens), 0, range(-(-tokens // _PAGE)))]


def _measure(model: NativeModel, pool: torch.Tensor, name: str, slices: Sequence[SequenceSlice]) -> Figure:
    model.forward(build_batch(slices, _PAGE), pool)
    model.take_phases()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _REPEATS_S:
        began = time.perf_counter()
        model.forward(build_batch(slices, _PAGE), pool)
        times.append(time.perf_counter() - began)
    phases = {phase: total / len(times) for phase, total in model.take_phases().items()}
    scale = statistics.median(times) / statistics.mean(times)
    return Figure(name, 1e3 * statistics.median(times), 1e3 * min(times), {phase: value * scale for phase, value in phases.items()})


def _print_table(title: str, figures: Sequence[Figure]) -> None:
    table = Table(title=title)
    table.add_column("ms a step")
    for figure in figures:
        table.add_column(figure.name, justify="right")
    for phase in figures[0].phases:
        table.add_row(phase, *(f"{figure.phases[phase]:.2f}" for figure in figures))
    table.add_row("outside phases", *(f"{figure.outside:.2f}" for figure in figures))
    table.add_row("median", *(f"{figure.median:.2f}" for figure in figures))
    table.add_row("least", *(f"{figure.least:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()

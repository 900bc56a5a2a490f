"""Times the products of a model's layers alone, by weight format and rows: `python -m bench.cpu_kernels [--rows 1 16 256]`.

For each: milliseconds of all layers' products, one after the other as a step does them, each at its shortest; bytes of
weights and operations a second; the fraction of what binds them (measured: reading memory, and the formats' inner loops on
data in the first-level cache); and torch's own best. Nothing else should run. Needs a C++ compiler, no model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cpu_kernel_library import FORMATS, Kernels, Layers
from bench.cpu_torch import torch_best
from bench.options import new_parser
from tandem.cores import num_usable_cores

SMOLLM2_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
SMOLLM2_HEAD = (49_152, 576)
NUM_LAYERS = 30


@dataclass(frozen=True)
class Figure:
    """One format at one number of rows."""

    format: str
    part: str
    rows: int
    milliseconds: float
    gigabytes_per_second: float
    gigaoperations_per_second: float
    fraction: float
    prepare_milliseconds: float
    """One thread's, to make all inputs ready: quantising for the integer formats."""
    torch: str


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    kernels = Kernels(options.threads, options.instruction_set)
    print(kernels.description, flush=True)
    figures = list(_measure(options, kernels))
    _print_table(figures)
    if options.json:
        content = {"machine": kernels.description, "threads": options.threads, "figures": [asdict(each) for each in figures]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("cpu_kernels", "Times the products of a model's layers on a CPU, by weight format and rows.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="weight formats")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], help="rows of a step")
    parser.add_argument("--threads", type=int, default=num_usable_cores(), help="that compute together")
    parser.add_argument("--instruction-set", help="one that this processor has, instead of its best")
    parser.add_argument("--no-torch", action="store_true", help="leave the library's products out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def _measure(options: argparse.Namespace, kernels: Kernels) -> Iterator[Figure]:
    for format in options.formats:
        for part, shapes, most in (("layers", SMOLLM2_LAYER * NUM_LAYERS, max(options.rows)), ("head", (SMOLLM2_HEAD,), 16)):
            layers = Layers(format, shapes)
            for rows in (count for count in options.rows if count <= most):
                beside = "-" if options.no_torch else torch_best(layers, rows, options.threads)
                yield _figure(kernels, layers, part, rows, beside)


def _figure(kernels: Kernels, layers: Layers, part: str, rows: int, beside: str) -> Figure:
    seconds = kernels.seconds(layers, rows)
    floor = max(layers.num_bytes / kernels.read_rate, layers.multiply_adds * rows / kernels.ceiling(layers.format))
    figure = Figure(
        format=layers.format,
        part=part,
        rows=rows,
        milliseconds=1e3 * seconds,
        gigabytes_per_second=1e-9 * layers.num_bytes / seconds,
        gigaoperations_per_second=2e-9 * layers.multiply_adds * rows / seconds,
        fraction=floor / seconds,
        prepare_milliseconds=1e3 * kernels.prepare_seconds(layers, rows),
        torch=beside,
    )
    print(figure, flush=True)
    return figure


def _print_table(figures: Sequence[Figure]) -> None:
    table = Table(title=f"Products of {NUM_LAYERS} layers, and of the head")
    for heading in ("format", "part", "rows", "ms", "GB/s", "GOP/s", "of the ceiling", "quantising ms", "torch's best, ms"):
        table.add_column(heading, justify="left" if heading in {"format", "part"} else "right")
    for item in figures:
        rates = f"{item.gigabytes_per_second:.1f}", f"{item.gigaoperations_per_second:.0f}", f"{item.fraction:.2f}"
        texts = f"{item.milliseconds:.2f}", *rates, f"{item.prepare_milliseconds:.2f}", item.torch
        table.add_row(item.format, item.part, str(item.rows), *texts)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

"""Times every GPU kernel alone: `python -m bench.kernels [--tune] [--only skinny] [--json out.json]`.

Prints for each the time, the rate, its fraction of the measured ceiling (bandwidth of a copy for kernels that read and write,
of reading for those that mostly read, the library's matrix product for arithmetic) and the time of torch's own best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_timing import Call, Ceilings, measure_ceilings, median_us, need_gpu
from bench.kernel_cases import Case, all_cases
from bench.options import new_parser


@dataclass(frozen=True)
class Figure:
    """One kernel at one shape; `fraction` is of the ceiling that binds it."""

    name: str
    microseconds: float
    gb_s: float
    tflop_s: float
    fraction: float
    torch_microseconds: float | None
    error: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    need_gpu()
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: {ceilings}", flush=True)
    figures = []
    for case in all_cases(options.tune):
        if options.only in case.name:
            figures.append(_measure(case, ceilings))
            print(_line(figures[-1]), flush=True)
    _print_table(figures)
    if options.json:
        text = {"device": torch.cuda.get_device_name(), "ceilings": asdict(ceilings), "kernels": [asdict(item) for item in figures]}
        options.json.write_text(json.dumps(text, indent=1) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("kernels", "Times every GPU kernel alone, against measured ceilings and the library's best.")
    parser.add_argument("--tune", action="store_true", help="also time the candidate shapes")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def _measure(case: Case, ceilings: Ceilings) -> Figure:
    try:
        time = median_us(case.calls)
    except Exception as error:  # a candidate may ask for more shared memory than there is; the others still count
        torch.cuda.synchronize()
        return Figure(case.name, 0.0, 0.0, 0.0, 0.0, None, f"{type(error).__name__}: {str(error)[:80]}")
    gb_s, tflop_s = case.num_bytes / time / 1e3, case.num_flops / time / 1e6
    mostly_reads = case.name.startswith(("skinny", "paged", "argmax", "draw", "block_checksums"))
    bandwidth = ceilings.read_gb_s if mostly_reads else ceilings.copy_gb_s
    fraction = tflop_s / ceilings.bf16_tflop_s if case.num_flops else gb_s / bandwidth
    return Figure(case.name, time, gb_s, tflop_s, fraction, _torch_time(case.torch_calls))


def _torch_time(calls: Sequence[Call] | None) -> float | None:
    try:
        return None if calls is None else median_us(calls)
    except RuntimeError:  # a backend that this build of torch lacks
        return None


def _line(figure: Figure) -> str:
    beside = "" if figure.torch_microseconds is None else f", torch {figure.torch_microseconds:.1f} us"
    rate = f"{figure.tflop_s:.0f} TFLOP/s" if figure.tflop_s else f"{figure.gb_s:.0f} GB/s"
    return f"{figure.name}: {figure.error or f'{figure.microseconds:.1f} us, {rate}, {figure.fraction:.2f} of the ceiling{beside}'}"


def _print_table(figures: Sequence[Figure]) -> None:
    table = Table(title="kernels")
    for heading in ("kernel", "us", "GB/s", "TFLOP/s", "of ceiling", "torch us"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for item in figures:
        beside = "-" if item.torch_microseconds is None else f"{item.torch_microseconds:.1f}"
        table.add_row(
            item.name, f"{item.microseconds:.1f}", f"{item.gb_s:.0f}", f"{item.tflop_s:.0f}", f"{item.fraction:.2f}", beside
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

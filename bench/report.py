"""Figures from records, as a table for people, JSON for programs and a plot for the eye."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.client import Record, Shape

Figures = Mapping[str, float]

COLUMNS: Mapping[str, str] = {
    "output_tokens_per_second": "out tok/s",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
    "tpot_p50_ms": "TPOT p50 ms",
    "itl_p50_ms": "ITL p50 ms",
    "itl_p99_ms": "ITL p99 ms",
    "itl_max_ms": "ITL max ms",
    "prefill_tokens_per_second": "prefill tok/s",
    "handoff_p50_ms": "hand-off p50 ms",
    "handoff_p99_ms": "hand-off p99 ms",
}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100).__trunc__() - 1)]


def figures_of(shape: Shape, records: Sequence[Record]) -> Figures:
    """All figures of one load. `prefill_tokens_per_second` is the median over requests of prompt tokens over the prefill phase;
    hand-off is what the gateway saw from the first token's arrival to the first decode step's begin."""
    wall_s = max(record.arrivals[-1] for record in records) - min(record.sent for record in records)
    ttft = [1e3 * record.ttft_s for record in records]
    gaps = [1e3 * gap for record in records for gap in record.gaps_s] or [0.0]
    handoff = [(record.timings.handoff_us + record.timings.decode_queue_us) / 1e3 for record in records]
    prefill = [shape.prompt_tokens * 1e6 / max(1, record.timings.prefill_us) for record in records]
    return {
        "output_tokens_per_second": sum(len(record.arrivals) for record in records) / wall_s,
        "ttft_p50_ms": statistics.median(ttft),
        "ttft_p99_ms": percentile(ttft, 99),
        "tpot_p50_ms": 1e3 * statistics.median(record.tpot_s for record in records),
        "itl_p50_ms": statistics.median(gaps),
        "itl_p99_ms": percentile(gaps, 99),
        "itl_max_ms": max(gaps),
        "prefill_tokens_per_second": statistics.median(prefill),
        "handoff_p50_ms": statistics.median(handoff),
        "handoff_p99_ms": percentile(handoff, 99),
    }


def print_table(rows: Mapping[str, Figures], title: str) -> None:
    table = Table(title=title)
    table.add_column("in/out, streams")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[key]:.1f}" for key in COLUMNS))
    Console(width=180).print(table)


def write_json(path: Path, rows: Mapping[str, Figures], about: Mapping[str, str]) -> None:
    machine = {"machine": platform.machine(), "processor": platform.processor(), "python": platform.python_version()}
    path.write_text(json.dumps({"about": {**machine, **about}, "loads": dict(rows)}, indent=2) + "\n")


def write_plot(path: Path, rows: Mapping[str, Figures]) -> bool:
    """Three bar charts side by side; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("output_tokens_per_second", "ttft_p50_ms", "itl_p99_ms", "handoff_p50_ms")
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.5), layout="constrained")
    for axis, key in zip(axes, shown, strict=True):
        bars = axis.barh(list(rows), [figures[key] for figures in rows.values()])
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set_title(COLUMNS[key])
        axis.invert_yaxis()
        axis.margins(x=0.2)
    figure.savefig(path, dpi=120)
    return True

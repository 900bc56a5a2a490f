"""Figures as tables for people and as JSON for programs."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Figures
from bench.presets import Goal

# Heading, then the figures that share the column.
COLUMNS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("req/s", ("requests_per_second",)),
    ("out tok/s", ("output_tokens_per_second",)),
    ("TTFT ms\np50 / p90 / p99", ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms")),
    ("TPOT ms\np50 / p99", ("tpot_p50_ms", "tpot_p99_ms")),
    ("ITL ms\np50 / p99 / max", ("itl_p50_ms", "itl_p99_ms", "itl_max_ms")),
    ("hand-off ms\np50 / p99", ("handoff_p50_ms", "handoff_p99_ms")),
    ("prefill\ntok/s", ("prefill_tokens_per_second",)),
    ("goodput\nreq/s", ("goodput_per_second",)),
    ("sender lag\np99 ms", ("generator_lag_p99_ms",)),
)
# Of these, more is better; of all others, less.
MORE_IS_BETTER = frozenset({"requests_per_second", "output_tokens_per_second", "prefill_tokens_per_second", "goodput_per_second"})

WIDTH = 190


def print_table(rows: Mapping[str, Figures], title: str) -> None:
    table = Table(title=title, caption="hand-off: first token to second, so with the first decode step", caption_justify="left")
    table.add_column("load: in/out tokens")
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("errors")
    for name, figures in rows.items():
        table.add_row(name, *(" / ".join(_text(figures[key]) for key in keys) for _, keys in COLUMNS), _errors(figures))
    console = Console(width=WIDTH)
    console.print(table)
    for name, figures in rows.items():
        for reason in figures["void"]:
            console.print(f"[bold red]void[/] {name}: {reason}")


def print_ratios(rows: Mapping[str, Figures], others: Mapping[str, Figures], other_name: str) -> None:
    """Ours beside the other's: the factor by which ours is better, above 1 where it is."""
    table = Table(title=f"Tandem beside {other_name}: times better, so above 1 where Tandem is ahead")
    table.add_column("load: in/out tokens")
    for heading, _ in COLUMNS[:-1]:
        table.add_column(heading, justify="right")
    for name, figures in rows.items():
        cells = [" / ".join(_text(better_by(key, figures, others[name]), 2) for key in keys) for _, keys in COLUMNS[:-1]]
        table.add_row(name, *cells)
    Console(width=WIDTH).print(table)


def better_by(key: str, ours: Figures, other: Figures) -> float | None:
    """How many times better our figure is; None if one of the two is missing or nothing can be said."""
    mine, its = ours[key], other[key]
    if not mine or not its:
        return None
    ratio: float = mine / its if key in MORE_IS_BETTER else its / mine
    return ratio


def print_goals(rows: Mapping[str, Figures], goals: Sequence[Goal]) -> None:
    table = Table(title="Goals")
    for heading in ("load: in/out tokens", "figure", "goal", "measured", "", "peer"):
        table.add_column(heading, justify="left" if heading in ("load: in/out tokens", "figure", "") else "right")
    for goal in goals:
        measured = rows[goal.load][goal.figure] if goal.load in rows else None
        verdict = "not measured" if measured is None else _verdict(goal, measured, rows[goal.load]["void"])
        table.add_row(goal.load, goal.figure, goal.limit, _text(measured), verdict, goal.peer)
    Console(width=WIDTH).print(table)


def _verdict(goal: Goal, measured: float, void: Sequence[str]) -> str:
    missed = goal.missed_by(measured)
    if void or missed is None:
        return "void" if void else ""
    return f"missed by {100 * missed:.0f} %" if missed else "reached"


def _text(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _errors(figures: Figures) -> str:
    return ", ".join(f"{count} {name}" for name, count in figures["errors"].items()) or "none"


def write_json(path: Path, servers: Mapping[str, Mapping[str, Figures]], about: Mapping[str, Any]) -> None:
    """`servers`: rows of figures by load, by server."""
    machine = {
        "machine": platform.machine(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path.write_text(json.dumps({"about": {**machine, **about}, "servers": servers}, indent=2) + "\n", encoding="utf-8")

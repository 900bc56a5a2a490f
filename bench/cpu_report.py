"""The tables of bench.cpu: each figure beside the best peer's and beside the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cpu_floors import Floors
from bench.cpu_step import Figure
from bench.figures import Figures
from bench.loads import ClosedLoop
from bench.presets import CPU_STEPS
from bench.process_memory import Memory
from bench.report import MORE_IS_BETTER, better_by

COMPARED = {
    "output_tokens_per_second": "out tok/s",
    "ttft_p50_ms": "TTFT p50 ms",
    "tpot_p50_ms": "TPOT p50 ms",
    "itl_p50_ms": "ITL p50 ms",
    "itl_p99_ms": "ITL p99 ms",
}
_WIDTH = 150


@dataclass
class Footprint:
    """A server's start, and its memory then and after the loads. None where it was not started here."""

    start_s: float | None = None
    idle: Memory | None = None
    loaded: Memory | None = None


@dataclass(frozen=True)
class Alone:
    """A step without a server around it: tokens a second, and what they could be."""

    name: str
    format: str
    tokens_per_second: float
    floor: float
    goal: float | None
    peer: str


@dataclass(frozen=True)
class CpuReport:
    """All that was measured. `rows`: figures by load, by server; ours is the first."""

    rows: Mapping[str, Mapping[str, Figures]]
    footprints: Mapping[str, Footprint]
    formats: tuple[str, str]
    floors: Floors
    alone: Sequence[Alone]
    loads: Sequence[ClosedLoop] = field(default_factory=list)

    def print(self) -> None:
        console = Console(width=_WIDTH)
        for table in (self._comparison(), self._beside_floors(), self._alone(), self._footprints()):
            if table.row_count:
                console.print(table)

    def as_json(self) -> dict[str, Any]:
        """What is not in the servers' rows."""
        return {
            "best_peer": [dict(zip(_COMPARISON, line, strict=True)) for line in self._compared()],
            "beside_floors": [dict(zip(_BESIDE_FLOORS, line, strict=True)) for line in self._floor_lines()],
        }

    def _compared(self) -> list[tuple[str, str, float | None, str, float | None, float | None]]:
        """Load, figure, ours, the best peer, its figure, and how many times better ours is."""
        ours, *peers = self.rows
        lines = []
        for load, figures in self.rows[ours].items():
            for key, heading in COMPARED.items():
                best, value = best_of(key, {peer: self.rows[peer][load] for peer in peers})
                ratio = better_by(key, figures, self.rows[best][load]) if best else None
                lines.append((load, heading, figures[key], best, value, ratio))
        return lines

    def _comparison(self) -> Table:
        table = _table("Beside the best peer of each figure: times better, above 1 where Tandem is ahead", _COMPARISON)
        for load, heading, mine, best, value, ratio in self._compared() if len(self.rows) > 1 else ():
            table.add_row(load, heading, _text(mine), best or "-", _text(value), _text(ratio, 2))
        return table

    def _floor_lines(self) -> list[tuple[str, str, float, float | None, float | None]]:
        """Load, figure, floor, measured, and the fraction of the floor's speed that was reached."""
        prefill, decode = self.formats
        ours, lines = next(iter(self.rows.values())), []
        for load in (each for each in self.loads if each.name in ours):
            figures = ours[load.name]
            rate = self.floors.rate(load, prefill, decode)
            tokens_per_second = figures["output_tokens_per_second"]
            lines.append((load.name, "out tok/s", rate, tokens_per_second, tokens_per_second / rate))
            context = load.prompt_tokens + load.completion_tokens // 2
            step_ms = 1e3 * self.floors.decode_step_s(decode, load.streams, context)
            lines.append(
                (load.name, f"ITL p50 ms, {decode}", step_ms, figures["itl_p50_ms"], _share(step_ms, figures["itl_p50_ms"]))
            )
            if load.streams == 1:
                prompt_ms = 1e3 * self.floors.prefill_s(prefill, load.prompt_tokens)
                ttft_ms = figures["ttft_p50_ms"]
                lines.append((load.name, f"TTFT p50 ms, {prefill}", prompt_ms, ttft_ms, _share(prompt_ms, ttft_ms)))
        return lines

    def _beside_floors(self) -> Table:
        rates = ", ".join(f"{format} {2e-9 * rate:.0f} GOP/s" for format, rate in self.floors.rates.items())
        table = _table(f"Floors: memory read at {1e-9 * self.floors.read_rate:.1f} GB/s; {rates}", _BESIDE_FLOORS)
        for load, figure, floor, measured, share in self._floor_lines():
            table.add_row(load, figure, _text(floor), _text(measured), _text(share, 2))
        return table

    def _alone(self) -> Table:
        table = _table("The engine's steps alone, in process", ("step", "weights", "tok/s", "goal", "peer", "floor", "fraction"))
        for each in self.alone:
            goal = "-" if each.goal is None else f">= {each.goal:g}"
            fraction = each.tokens_per_second / each.floor
            table.add_row(
                each.name, each.format, _text(each.tokens_per_second), goal, each.peer, _text(each.floor), _text(fraction, 2)
            )
        return table

    def _footprints(self) -> Table:
        table = _table(
            "Start to the first answer; memory in MB: resident (proportional: pages shared by several processes count once)",
            ("server", "start s", "after the first answer", "after the loads"),
        )
        for name, each in self.footprints.items():
            table.add_row(
                name, _text(each.start_s), *("-" if memory is None else str(memory) for memory in (each.idle, each.loaded))
            )
        return table


_COMPARISON = ("load: in/out tokens", "figure", "Tandem", "best peer", "its figure", "times better")
_BESIDE_FLOORS = ("load: in/out tokens", "figure", "floor", "Tandem", "fraction of the floor")


def best_of(key: str, rows: Mapping[str, Figures]) -> tuple[str, float | None]:
    """The server with the best figure, and the figure; "" and None if none has it."""
    found = {name: figures[key] for name, figures in rows.items() if figures[key] and not figures["errors"]}
    if not found:
        return "", None
    best = (max if key in MORE_IS_BETTER else min)(found, key=lambda name: found[name])
    return best, found[best]


def alone(name: str, format: str, figure: Figure, floors: Floors, context: int) -> Alone:
    """`name`: "decode 16" or "prefill 512", as cpu_step names its cases."""
    role, _, size = name.partition(" ")
    count = int(size)
    floor_s = floors.prefill_s(format, count) if role == "prefill" else floors.decode_step_s(format, count, context)
    goal, peer = CPU_STEPS.get(name, (None, "-"))
    return Alone(name, format, 1e3 * count / figure.median, count / floor_s, goal, peer)


def _share(floor: float, measured: float | None) -> float | None:
    return floor / measured if measured else None


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, heading in enumerate(headings):
        words = number == 0 or heading in ("figure", "best peer", "weights", "peer")
        table.add_column(heading, justify="left" if words else "right")
    return table


def _text(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"

"""Figures for the eye: latency by load, with the objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Figures, Objective
from bench.loads import Load

Rows = Mapping[str, Figures]

# Title, unit, and the lines: figure, label, style.
PANELS: Sequence[tuple[str, str, Sequence[tuple[str, str, str]]]] = (
    ("Time to first token", "ms", (("ttft_p50_ms", "p50", "-"), ("ttft_p90_ms", "p90", "--"), ("ttft_p99_ms", "p99", ":"))),
    ("Gap between tokens", "ms", (("itl_p50_ms", "p50", "-"), ("itl_p99_ms", "p99", ":"))),
    ("Hand-off and first decode step", "ms", (("handoff_p50_ms", "p50", "-"), ("handoff_p99_ms", "p99", ":"))),
    ("Served", "requests a second", (("requests_per_second", "complete", "-"), ("goodput_per_second", "within objective", "--"))),
)
KINDS = {"closed": "streams (closed loop)", "open": "offered load (open loop)"}
COLOURS = ("tab:blue", "tab:orange")


def write_plot(path: Path, servers: Mapping[str, Rows], loads: Sequence[Load], objective: Objective) -> bool:
    """One row of panels for the closed loops and one for the open ones; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if any(load.kind == kind for load in loads)]
    size = (4.2 * len(PANELS), 3.4 * len(kinds) + 0.4)
    figure, axes = plt.subplots(len(kinds), len(PANELS), figsize=size, layout="constrained", squeeze=False)
    for kind, row in zip(kinds, axes, strict=True):
        for axis, (title, unit, lines) in zip(row, PANELS, strict=True):
            _draw_panel(axis, servers, [load for load in loads if load.kind == kind], lines)
            axis.set(title=title, xlabel=KINDS[kind], ylabel=unit)
            _draw_objective(axis, title, objective)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _draw_panel(axis: Any, servers: Mapping[str, Rows], loads: Sequence[Load], lines: Sequence[tuple[str, str, str]]) -> None:
    """One line a server, size of request and percentile; loads of one size are joined."""
    sizes = sorted({_size(load) for load in loads})
    markers = dict(zip(sizes, "osD^v<>*", strict=False))
    for colour, (server, rows) in zip(COLOURS, servers.items(), strict=False):
        for size in sizes:
            ordered = sorted((load for load in loads if _size(load) == size), key=lambda load: load.intensity)
            for key, label, style in lines:
                points = [(load.intensity, rows[load.name][key]) for load in ordered if rows[load.name][key] is not None]
                name = " ".join(
                    part for part in (server if len(servers) > 1 else "", size if len(sizes) > 1 else "", label) if part
                )
                axis.plot(*zip(*points, strict=True), style, marker=markers.get(size, "."), color=colour, label=name, markersize=4)
    axis.set_xticks(sorted({load.intensity for load in loads}))
    axis.grid(alpha=0.25)


def _draw_objective(axis: Any, title: str, objective: Objective) -> None:
    limit = {"Time to first token": objective.ttft_ms, "Gap between tokens": objective.itl_ms}.get(title)
    if limit is not None:
        axis.axhline(limit, color="tab:red", linewidth=1, label=f"objective {limit:g} ms")


def _size(load: Load) -> str:
    return load.name.partition(",")[0] if hasattr(load, "prompt_tokens") else load.name.partition(" x")[0]

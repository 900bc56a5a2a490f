"""What a run came to, on one screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.faults.memory import Growth, growths
from tests.faults.oracle import Fault, Run, Verdict, judge, stream_problem, tally


def passed(run: Run) -> bool:
    """Every invariant held, and no client saw an error."""
    return all(verdict.held is not False for verdict in judge(run)) and not client_errors(run)


def client_errors(run: Run) -> list[str]:
    return [f"request {r.number} ({r.kind}): {r.code} {r.reason}: {r.message}" for r in run.records if r.is_client_error]


def wrong_tokens(run: Run) -> int:
    return sum(bool(stream_problem(record)) for record in run.records)


def print_verdict(run: Run, title: str, replay: str, console: Console | None = None) -> None:
    console = console or Console(width=132)
    console.rule(title)
    console.print(f"requests     {len(run.records)}: {_counts(tally(run.records, lambda record: str(record.code)))}")
    console.print(f"asked for    {_counts(tally(run.records, lambda record: record.kind))}")
    console.print(f"errors       {len(client_errors(run))} seen by clients; {wrong_tokens(run)} streams with wrong tokens")
    for line in client_errors(run)[:5]:
        console.print(f"             {line}", markup=False)
    console.print(f"the gateway  {_counts(dict(run.failover))}")
    console.print(_faults(run.faults))
    console.print(f"blocks       {'not all free after 10 s' if run.idle_after_s is None else _freed(run.idle_after_s)}")
    console.print(_processes(run))
    console.print(_invariants(judge(run)))
    if passed(run):
        console.print("[bold green]PASSED[/]")
    else:
        console.print(f"[bold red]FAILED[/]  replay: {escape(replay)}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _faults(faults: Sequence[Fault]) -> Table:
    table = Table("fault", "times", "detected s: median, worst", "whole again s: median, worst", box=None, pad_edge=False)
    for kind in sorted({fault.kind for fault in faults}):
        of_kind = [fault for fault in faults if fault.kind == kind]
        detected = [fault.detected_s for fault in of_kind if fault.detected_s is not None]
        whole = [fault.recovered_s for fault in of_kind if fault.recovered_s is not None]
        table.add_row(kind, str(len(of_kind)), _spread(detected), _spread(whole))
    return table


def _freed(idle_after_s: float) -> str:
    return f"every block free, and nothing running anywhere, {idle_after_s:.1f} s after the last request"


def _processes(run: Run) -> Table:
    """What each held before the load and after it, and how the memory of those grew that lived long enough to tell."""
    names = ("process", "MB per 1,000 requests", "MB before, after", "tasks before, after", "descriptors before, after")
    table = Table(*names, box=None, pad_edge=False)
    found = growths(run.samples)
    for name, before in run.before.items():
        sizes = [sample.rss_bytes / 2**20 for sample in run.samples if sample.name == name]
        after = run.after.get(name)
        table.add_row(
            name,
            _grown([growth for growth in found if growth.name == name]),
            f"{sizes[0]:.0f}, {sizes[-1]:.0f}" if sizes else "-",
            f"{before.tasks}, {'?' if after is None else after.tasks}",
            f"{before.num_descriptors}, {'?' if after is None else after.num_descriptors}",
        )
    return table


def _grown(lives: Sequence[Growth]) -> str:
    """Of one place in the suite, which several processes may have filled one after the other."""
    judged = [f"{growth.mib_per_1000:+.2f}" for growth in lives if growth.mib_per_1000 is not None]
    if judged:
        return ", ".join(judged)
    return f"unjudged: {max((growth.requests_lived for growth in lives), default=0)} requests at most"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}, {max(values):.2f}" if values else "-"


def _invariants(verdicts: Sequence[Verdict]) -> Table:
    table = Table("", "", "invariant", "", box=None, pad_edge=False)
    marks = {True: "[green]held[/]", False: "[red]BROKEN[/]", None: "[dim]not judged[/]"}
    for verdict in verdicts:
        table.add_row(verdict.name, marks[verdict.held], verdict.about, escape(verdict.detail))
    return table

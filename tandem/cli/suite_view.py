"""What `tandem up` shows: the start of each process, the suite once it serves, and what happens to it later."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tandem.supervisor import describe_status

_LOADING = re.compile(r"loading\s+(\d+) %: (.*)")
_BAR_CELLS = 20


@dataclass
class _Row:
    """One process while the suite starts."""

    state: str = "starting"
    percent: int | None = None


class StartView:
    """Hears about the children (a supervisor's Observer) and shows how far each is."""

    def __init__(self, console: Console, names: Iterable[str], verbose: bool) -> None:
        self._console = console
        self._verbose = verbose
        self._rows = {name: _Row() for name in names}
        self._live: Live | None = None
        self._begin = time.monotonic()
        # Called with a child's name whenever it has been started; set once the suite serves.
        self.on_restart: Callable[[str], None] | None = None

    def __enter__(self) -> StartView:
        if self._console.is_terminal and not self._verbose:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, row in self._rows.items():
            table.add_row(self._sign(row), Text(name, style="bold"), self._bar(row), Text(row.state, style="dim", no_wrap=True))
        table.add_row("", Text(f"{time.monotonic() - self._begin:.0f} s", style="dim"))
        return table

    def started(self, name: str) -> None:
        self._rows[name] = _Row()
        if self.on_restart is not None:
            self.on_restart(name)

    def line(self, name: str, line: str) -> None:
        if self._verbose:
            self._console.out(f"{name:>10} │ {line}", highlight=False)
        if match := _LOADING.search(line):
            self._advance(name, int(match[1]), match[2])

    def died(self, name: str, status: int, restart_in_s: float) -> None:
        text = f"{name} {describe_status(status)}; starting it again in {restart_in_s:g} s"
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def serving(self, name: str) -> None:
        self._advance(name, 100, "serving")

    def _advance(self, name: str, percent: int, state: str) -> None:
        row = self._rows[name]
        if self._live is None and not self._verbose and state != row.state:
            self._console.print(Text(f"{name}: {state}", style="dim"), soft_wrap=True)
        row.percent, row.state = percent, state

    def _sign(self, row: _Row) -> RenderableType:
        return Text("✓", style="green") if row.state == "serving" else Spinner("dots")

    def _bar(self, row: _Row) -> RenderableType:
        return ProgressBar(100, row.percent or 0, width=_BAR_CELLS, pulse=row.percent is None)


def choose_transport(prefill: Sequence[Sequence[str]], decode: Sequence[Sequence[str]]) -> tuple[str, str]:
    """The transport that hand-offs take, and why: the best that all workers have, by the prefill workers' order."""
    shared = [name for name in (prefill[0] if prefill else ()) if all(name in names for names in (*prefill, *decode))]
    if not shared:
        return "none", "the workers have no transport in common; requests that need a hand-off will fail"
    reasons = {
        "shm": "all workers run on this host, so decode maps prefill's blocks",
        "tcp": "shared memory is not available to every worker",
    }
    others = [name for name in shared if name != shared[0]]
    reason = reasons.get(shared[0], "the best that all workers have")
    return shared[0], reason + (f"; {', '.join(others)} would work too" if others else "")

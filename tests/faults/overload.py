"""`python -m tests.faults.overload`: what a suite of known capacity still gets done when it is asked for 2, 5 and 10 times that.

Real processes and real gRPC; the workers' model takes declared times and hardly any CPU, so the capacity is theirs and not the
machine's. The peak is measured in a closed loop, then each overload in an open one, with the arrivals of a trace. Goodput is what
ends with OK within its deadline. Afterwards half of the capacity is asked for, and within 10 s every request must be served again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.members import Shape
from tests.faults.oracle import Record, stream_problem, tally
from tests.faults.questions import fake_question
from tests.faults.run import log_directory
from tests.faults.suite import Suite
from tests.faults.traffic import Arrival, Asked, Client, Scale, arrivals, blank, converse

GOAL = 0.9
RECOVERY_S = 10.0
DEADLINE_S = 3.0
"""Of every request: some three times what it takes in a quiet suite."""
SETTLE_S = 2.0
"""From a stage's beginning until what ends is what this stage asked for."""
PROMPT_TOKENS, COMPLETION_TOKENS = 60, 20
NUM_CLIENTS = 12
BOUNDS = {
    "decode": ("--max-batch", "4", "--max-sequences", "4"),
    "gateway": ("--max-wait-s", "1"),
}
# What is scarce: places in the decode workers, each for 20 steps of 40 ms, or the prefill workers' time.
SHAPES = {
    "decode": Shape(step_ms=40.0, token_us=0.0, flags=BOUNDS),
    "prefill": Shape(step_ms=2.0, token_us=3200.0, flags={"gateway": BOUNDS["gateway"]}),
}


@dataclass
class Stage:
    """So many seconds of one load. `gateway_cpu`: cores that the gateway used; `late_s`: how far behind its plan the driver was."""

    name: str
    seconds: float
    began: float = 0.0
    records: list[Record] = field(default_factory=list)
    gateway_cpu: float = 0.0
    late_s: float = 0.0

    @property
    def offered_per_s(self) -> float:
        return len(self.records) / self.seconds

    @property
    def goodput_per_s(self) -> float:
        """Once the stage had settled."""
        first, last = self.began + SETTLE_S, self.began + self.seconds
        return sum(record.code == "OK" and first <= record.ended < last for record in self.records) / (last - first)

    @property
    def recovered_s(self) -> float:
        """From the beginning until the last request left that was not served, or only late."""
        bad = [r for r in self.records if r.code != "OK" or r.ended - r.began > r.deadline_s / 2]
        return max((record.began - self.began for record in bad), default=0.0)


@dataclass
class Outcome:
    """What was measured."""

    peak: Stage
    overloads: list[Stage]
    recovery: Stage

    @property
    def stages(self) -> list[Stage]:
        return [self.peak, *self.overloads, self.recovery]

    def problems(self, goal: float = GOAL) -> list[str]:
        """Everything that should not be."""
        found = [problem for stage in self.overloads for problem in _overload_problems(stage, self.peak, goal)]
        found += [problem for stage in self.stages for problem in _record_problems(stage)]
        if self.recovery.recovered_s > RECOVERY_S:
            found.append(f"{self.recovery.recovered_s:.1f} s after the overload a request was still not served well")
        return found


def _overload_problems(stage: Stage, peak: Stage, goal: float) -> list[str]:
    found = []
    if stage.goodput_per_s < goal * peak.goodput_per_s:
        found.append(f"{stage.name}: {stage.goodput_per_s:.1f} a second are below {goal:.0%} of {peak.goodput_per_s:.1f}")
    if stage.late_s > SETTLE_S / 2:
        found.append(f"{stage.name}: the load was {stage.late_s:.1f} s late, so the machine is too slow to judge by")
    return found


def _record_problems(stage: Stage) -> list[str]:
    groups = {
        "ended oddly": [r for r in stage.records if r.code not in ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")],
        "were refused without RetryInfo": [r for r in stage.records if r.code == "RESOURCE_EXHAUSTED" and not r.has_retry_info],
        "had wrong tokens": [r for r in stage.records if stream_problem(r)],
        "ended after their deadline": [r for r in stage.records if r.ended - r.began > r.deadline_s + 1.0],
    }
    return [f"{stage.name}: {len(some)} requests {what}, the first: {some[0]}" for what, some in groups.items() if some]


class Overload:
    """Runs once, over a suite that serves already."""

    def __init__(self, suite: Suite, seed: int) -> None:
        assert suite.channel is not None
        self._suite = suite
        self._client = Client(suite.channel)
        self._questions = questions(seed)

    async def run(self, seconds: float, factors: Sequence[float], recovery_s: float = RECOVERY_S + SETTLE_S) -> Outcome:
        peak = await self._closed("peak", seconds)
        rate = peak.goodput_per_s
        overloads = [await self._open(f"{factor:g} x", seconds, factor * rate) for factor in factors]
        recovery = await self._open("then 0.5 x", recovery_s, rate / 2)
        await self._client.finish(DEADLINE_S + SETTLE_S)
        return Outcome(peak, overloads, recovery)

    async def _closed(self, name: str, seconds: float) -> Stage:
        """More clients than places, each with one request at a time."""
        stage, before = Stage(name, seconds, time.monotonic()), self._gateway_cpu_s()

        async def client() -> None:
            while time.monotonic() < stage.began + seconds:
                asked = next(self._questions)
                stage.records.append(record := blank(asked))
                await converse(self._client.channel, asked, record)

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        stage.gateway_cpu = (self._gateway_cpu_s() - before) / seconds
        return stage

    async def _open(self, name: str, seconds: float, rate_per_s: float) -> Stage:
        stage, before = Stage(name, seconds, time.monotonic()), self._gateway_cpu_s()
        for moment in moments(seconds, rate_per_s):
            await asyncio.sleep(max(0.0, stage.began + moment - time.monotonic()))
            stage.late_s = max(stage.late_s, time.monotonic() - stage.began - moment)
            stage.records.append(self._client.send(next(self._questions)))
        await asyncio.sleep(max(0.0, stage.began + seconds - time.monotonic()))
        stage.gateway_cpu = (self._gateway_cpu_s() - before) / seconds
        return stage

    def _gateway_cpu_s(self) -> float:
        times = self._suite.process("gateway").cpu_times()
        return float(times.user + times.system)


def questions(seed: int) -> Iterator[Asked]:
    """All of one size: a suite then does the same work for each."""
    for number in itertools.count():
        asked = fake_question(number, Arrival(0.0, PROMPT_TOKENS, COMPLETION_TOKENS), seed, "plain")
        yield replace(asked, deadline_s=DEADLINE_S)


def moments(seconds: float, rate_per_s: float) -> list[float]:
    """The trace's next arrivals, at a pace that makes them so many a second."""
    count = round(seconds * rate_per_s)
    found = [arrival.at_s for arrival in arrivals(count, Scale(pace=1.0))[: count + 1]]
    return [at_s * seconds / found[-1] for at_s in found[:-1]]


def print_outcome(outcome: Outcome, title: str, console: Console | None = None) -> None:
    """One screen."""
    console = console or Console(width=132)
    console.rule(title)
    names = (
        "load",
        "asked/s",
        "good/s",
        "of peak",
        "OK",
        "refused",
        "deadline",
        "s p50, p99 of OK",
        "gateway cores",
        "driver late s",
    )
    table = Table(*names, box=None, pad_edge=False)
    for stage in outcome.stages:
        table.add_row(*_row(stage, outcome.peak))
    console.print(table)
    console.print(f"recovered    {outcome.recovery.recovered_s:.1f} s after the last overload")
    for problem in outcome.problems():
        console.print(f"             {problem}", markup=False)
    console.print("[bold red]FAILED[/]" if outcome.problems() else "[bold green]PASSED[/]")


def _row(stage: Stage, peak: Stage) -> Sequence[str]:
    counts = tally(stage.records, lambda record: str(record.code))
    took = sorted(record.ended - record.began for record in stage.records if record.code == "OK") or [0.0]
    return (
        stage.name,
        f"{stage.offered_per_s:.1f}",
        f"{stage.goodput_per_s:.1f}",
        f"{stage.goodput_per_s / peak.goodput_per_s:.0%}",
        *(str(counts.get(code, 0)) for code in ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")),
        f"{took[len(took) // 2]:.2f}, {took[len(took) * 99 // 100]:.2f}",
        f"{stage.gateway_cpu:.2f}",
        f"{stage.late_s:.2f}",
    )


async def measure(scarce: str, seconds: float, factors: Sequence[float], seed: int, logs: Path) -> Outcome:
    """A suite of its own; every block is free again at the end."""
    async with Suite(SHAPES[scarce], logs) as suite:
        outcome = await Overload(suite, seed).run(seconds, factors)
        await suite.wait_idle()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.overload", description="Measures goodput under overload.")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0, 5.0, 10.0], help="multiples of the peak")
    parser.add_argument("--scarce", choices=tuple(SHAPES), default="decode", help="the workers that are the bottleneck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=log_directory("overload"))
    arguments = parser.parse_args()
    outcome = asyncio.run(measure(arguments.scarce, arguments.seconds, arguments.factors, arguments.seed, arguments.logs))
    print_outcome(outcome, f"overload: {arguments.scarce} is scarce, {arguments.seconds:g} s a load, seed {arguments.seed}")
    raise SystemExit(bool(outcome.problems()))


if __name__ == "__main__":
    main()

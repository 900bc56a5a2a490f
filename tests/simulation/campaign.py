"""Many seeds over several processes, and one verdict on them."""

import asyncio
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.worker import READY, Outcome

SEEDS_AT_ONCE = 10
"""Asked of a process at a time: little enough to end soon after the limit, enough not to let it wait."""
LONGEST_SEED_S = 120.0
"""Of real time, start of the process included. A seed takes some 50 ms; one that takes so much longer hangs."""
LINE_BYTES = 1 << 24
PRINT_EVERY_S = 30.0
"""How often progress is told where there is no terminal."""


@dataclass(frozen=True)
class Plan:
    """What to run, and when to stop early: after `stop_after` failing seeds, or `limit_s` seconds if given."""

    first: int
    num_seeds: int
    num_processes: int
    limit_s: float | None
    stop_after: int
    without: str


@dataclass
class Tally:
    """What the seeds that were run gave."""

    num_seeds: int = 0
    num_events: int = 0
    digest: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        self.num_events += outcome.num_events
        self.digest = (self.digest + outcome.digest) % (1 << 64)  # in any order
        self.injected += outcome.injected
        self.requests += outcome.requests
        if outcome.violations:
            self.failed.append(outcome)


class Campaign:
    """Hands seeds to processes and takes in what they gave."""

    def __init__(self, plan: Plan, progress: "Progress") -> None:
        self.plan = plan
        self.tally = Tally()
        self._progress = progress
        self._next = plan.first
        self._end = plan.first + plan.num_seeds
        self._ends_at = None if plan.limit_s is None else time.monotonic() + plan.limit_s

    async def run(self) -> Tally:
        """Raises RuntimeError if the simulation does not start."""
        await asyncio.gather(*(self._work() for _ in range(self.plan.num_processes)))
        return self.tally

    @property
    def failed_enough(self) -> bool:
        return len(self.tally.failed) >= self.plan.stop_after

    @property
    def out_of_time(self) -> bool:
        return self._ends_at is not None and time.monotonic() >= self._ends_at

    async def _work(self) -> None:
        """One process after the other: a seed that ends its process, or hangs, has failed, and another goes on after it."""
        due: deque[int] = deque()
        while not self.failed_enough and (due or self._take(due)):
            process = await self._start()
            try:
                while due or self._take(due):
                    await self._run(process, due)
            except (EOFError, TimeoutError) as error:
                seed = due.popleft()
                self._add(Outcome(seed, violations=[f"the process that ran it {error}"]))
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()

    def _take(self, due: deque[int]) -> bool:
        if self.out_of_time or self.failed_enough:
            return False
        last = min(self._next + SEEDS_AT_ONCE, self._end)
        due.extend(range(self._next, last))
        self._next = last
        return bool(due)

    async def _start(self) -> asyncio.subprocess.Process:
        """Raises RuntimeError if it does not get as far as to take seeds."""
        process = await self._spawn()
        assert process.stdout is not None
        if await process.stdout.readline() != READY.encode():
            raise RuntimeError("the simulation does not start")
        return process

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.simulation", "--serve", "--without", self.plan.without),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )

    async def _run(self, process: asyncio.subprocess.Process, due: deque[int]) -> None:
        """Raises EOFError or TimeoutError at the seed that is now the first of those due."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{due[0]} {len(due)}\n".encode())
        while due:
            line = await _line(process.stdout)
            if not line:
                raise EOFError(f"ended with status {await process.wait()}")
            due.popleft()
            self._add(Outcome.from_json(line))
            if self.failed_enough:
                due.clear()

    def _add(self, outcome: Outcome) -> None:
        self.tally.add(outcome)
        if outcome.violations:
            self._progress.clear()
            print(failure(outcome, self.plan.without), flush=True)
        self._progress.show(self.tally)


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(LONGEST_SEED_S):
            return await stream.readline()
    except TimeoutError:
        raise TimeoutError(f"did not end it within {LONGEST_SEED_S:.0f} s") from None


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, num_seeds: int, write: Callable[[str], object], *, terminal: bool) -> None:
        self._num_seeds = num_seeds
        self._write = write
        self._terminal = terminal
        self._started = self._shown = time.monotonic()

    def show(self, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else PRINT_EVERY_S):
            return
        self._shown = now
        rate = tally.num_seeds / (now - self._started)
        share = tally.num_seeds / self._num_seeds
        left_s = (self._num_seeds - tally.num_seeds) / rate
        text = f"{tally.num_seeds} of {self._num_seeds} seeds, {len(tally.failed)} failed, {rate:.0f} seeds/s, {left_s:.0f} s left"
        if self._terminal:
            bar = "#" * int(30 * share)
            self._write(f"\r[{bar:<30}] {text} ")
        else:
            self._write(text + "\n")

    def clear(self) -> None:
        if self._terminal:
            self._write("\r\x1b[K")


def run(plan: Plan) -> int:
    """The exit status: 0 if every seed that was asked for held, 1 if one did not, 2 if the simulation does not start, 3 if time
    was out before all were run."""
    started, busy_before_s = time.monotonic(), _busy_s()
    progress = Progress(plan.num_seeds, lambda text: print(text, end="", file=sys.stderr, flush=True), terminal=sys.stderr.isatty())
    campaign = Campaign(plan, progress)
    try:
        tally = asyncio.run(campaign.run())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    progress.clear()
    print(verdict(plan, tally, time.monotonic() - started, _busy_s() - busy_before_s))
    if tally.failed:
        return 1
    return 0 if tally.num_seeds == plan.num_seeds else 3


def _busy_s() -> float:
    """Processor time of the processes that have ended, their start included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def verdict(plan: Plan, tally: Tally, seconds: float, busy_s: float) -> str:
    """On one screen."""
    last = plan.first + plan.num_seeds - 1
    wanted = "" if tally.num_seeds == plan.num_seeds else f" of {plan.num_seeds}"
    rate, rate_of_core = tally.num_seeds / seconds, tally.num_seeds / max(busy_s, 1e-3)
    processes = "" if plan.num_processes == 1 else f" over {plan.num_processes} processes"
    lines = [
        f"Simulation: {tally.num_seeds}{wanted} seeds ({plan.first} to {last}), {tally.num_events} events",
        f"  in         {seconds:.1f} s, {rate:.1f} seeds/s{processes}; {rate_of_core:.1f} per second of processor time",
        f"  faults     {counts(tally.injected)}",
        f"  requests   {counts(tally.requests)}",
        f"  digest     {tally.digest:016x}",
        f"  invariants {'held in every seed that was run' if not tally.failed else f'violated in {len(tally.failed)} seeds'}",
    ]
    lines += [f"    {replay_command(outcome.seed, plan.without)}" for outcome in sorted(tally.failed, key=lambda each: each.seed)]
    if wanted:
        reason = f"after {len(tally.failed)} failing seeds" if len(tally.failed) >= plan.stop_after else "because time was out"
        lines.append(f"  incomplete: stopped {reason}")
    return "\n".join(lines)


def failure(outcome: Outcome, without: str) -> str:
    lines = [f"seed {outcome.seed} failed; replay it with: {replay_command(outcome.seed, without)}"]
    return "\n".join(lines + [f"    {violation[:300]}" for violation in outcome.violations[:4]])


def replay_command(seed: int, without: str) -> str:
    return f"make sim SEED={seed}" + (f" ARGS='--without {without}'" if without else "")


def counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items(), key=lambda item: -item[1])) or "none"

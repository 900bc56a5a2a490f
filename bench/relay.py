"""`python -m bench.relay`: what tokens and requests cost each process beside the model. The real gateway and workers; steps
take a told time and compute nothing.

Wall times on a machine with few cores are those of all processes together; processor time is each one's own, and steadier.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench.figures import Figures, Objective, figures_of
from bench.generator_pool import GeneratorPool, generator_pool
from bench.loads import ClosedLoop, Extent, Load, PoissonArrivals
from bench.options import new_parser
from bench.suite import wait_until_ready
from tandem.addresses import free_port

MODEL = "random:tiny"
VOCABULARY_SIZE = 512
WARMUP_S = 0.5
# The least that passes both workers.
FEW_TOKENS = 2


@dataclass(frozen=True)
class Suite:
    """The gateway's address and the processes that are measured, by name."""

    address: str
    processes: Mapping[str, psutil.Process]


@dataclass(frozen=True)
class Row:
    """One load: microseconds of each process's time for each request or token."""

    name: str
    costs_us: Mapping[str, float]
    figures: Figures
    num_requests: int
    num_tokens: int
    num_messages: int


def main() -> None:
    parser = new_parser(
        "relay", "What tokens and requests cost gateway and workers beside the model, in processor time of each process."
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="streams at once, a load each")
    parser.add_argument("--step-ms", type=float, default=8.0, help="time of a decode step")
    parser.add_argument("--row-ms", type=float, default=0.2, help="and more for each of its sequences")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second, where it is requests that are measured")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each load")
    parser.add_argument("--processes", type=int, default=1, help="processes that send")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with suite(arguments.step_ms, arguments.row_ms) as measured:
        rows = asyncio.run(measure(measured, arguments))
    report(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({row.name: row.costs_us for row in rows}, indent=1))


@contextlib.contextmanager
def suite(step_ms: float, row_ms: float, *ends: Path) -> Iterator[Suite]:
    """`ends`: the file into which the decode worker writes when its steps ended, if that is asked for."""
    port = free_port("127.0.0.1")
    with worker("prefill", step_ms, row_ms) as prefill, worker("decode", step_ms, row_ms, *ends) as decode:
        targets = ("--prefill-targets", prefill[0], "--decode-targets", decode[0])
        gateway = subprocess.Popen([sys.executable, "-m", "gateway", "--model", MODEL, "--port", str(port), *targets])
        try:
            wait_until_ready(f"127.0.0.1:{port}", gateway)
            pids = {"gateway": gateway.pid, "prefill": prefill[1], "decode": decode[1]}
            yield Suite(f"127.0.0.1:{port}", {name: psutil.Process(pid) for name, pid in pids.items()})
        finally:
            gateway.terminate()
            gateway.wait()


@contextlib.contextmanager
def worker(role: str, step_ms: float, row_ms: float, *ends: Path) -> Iterator[tuple[str, int]]:
    """Its address and process id."""
    command = [sys.executable, "-m", "bench.relay_workers", role, str(step_ms), str(row_ms), *map(str, ends)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None, "made with pipes"
    try:
        address = child.stdout.readline().strip()
        if not address:
            raise SystemExit(f"the {role} worker did not start; its own messages say why")
        yield address, child.pid
    finally:
        child.stdin.close()
        child.wait()


async def measure(suite: Suite, arguments: argparse.Namespace) -> Sequence[Row]:
    """Requests first, whose cost is then taken off that of the tokens."""
    extent = Extent(seconds=arguments.seconds, warmup_s=WARMUP_S)
    async with generator_pool({"address": suite.address}, arguments.processes, VOCABULARY_SIZE, drain_s=10.0) as pool:
        await pool.run(ClosedLoop(arguments.prompt, FEW_TOKENS, 1), Extent(num_requests=20), seed=1)
        arrivals = PoissonArrivals(arguments.prompt, FEW_TOKENS, arguments.rate)
        requests = await run(suite, pool, arrivals, extent)
        rows = [per_request(requests)]
        for streams in arguments.streams:
            row = await run(suite, pool, ClosedLoop(arguments.prompt, arguments.tokens, streams), extent)
            rows.append(per_token(row, rows[0]))
    return rows


async def run(suite: Suite, pool: GeneratorPool, load: Load, extent: Extent) -> Row:
    """One load; the costs are of all of it."""
    before = {name: spent_us(process) for name, process in suite.processes.items()}
    measurement = await pool.run(load, extent, seed=round(load.intensity))
    costs = {name: spent_us(process) - before[name] for name, process in suite.processes.items()}
    counts = [record.counts for record in measurement.records]
    return Row(
        load.name, costs, figures_of(measurement, extent, Objective()), len(counts), sum(map(sum, counts)), sum(map(len, counts))
    )


def spent_us(process: psutil.Process) -> float:
    times = process.cpu_times()
    return 1e6 * float(times.user + times.system)


def per_request(row: Row) -> Row:
    costs = {name: cost / row.num_requests for name, cost in row.costs_us.items()}
    return Row(f"a request ({row.name})", costs, row.figures, row.num_requests, row.num_tokens, row.num_messages)


def per_token(row: Row, request: Row) -> Row:
    """Without what its requests cost."""
    num_further = row.num_tokens - FEW_TOKENS * row.num_requests
    costs = {name: (cost - request.costs_us[name] * row.num_requests) / num_further for name, cost in row.costs_us.items()}
    return Row(f"a token ({row.name})", costs, row.figures, row.num_requests, row.num_tokens, row.num_messages)


def report(rows: Sequence[Row]) -> None:
    table = Table(title="processor time, microseconds")
    for heading in (
        "for",
        *rows[0].costs_us,
        "all",
        "tok/s",
        "tokens/message",
        "TTFT p50/p99 ms",
        "ITL p50/p99 ms",
        "hand-off p50/p99 ms",
    ):
        table.add_column(heading, justify="left" if heading == "for" else "right")
    for row in rows:
        costs = [*row.costs_us.values(), sum(row.costs_us.values())]
        latencies = (_percentiles(row.figures, name) for name in ("ttft", "itl", "handoff"))
        rates = (f"{row.figures['output_tokens_per_second']:,.0f}", f"{row.num_tokens / row.num_messages:.2f}")
        table.add_row(row.name, *(f"{cost:.0f}" for cost in costs), *rates, *latencies)
    console = Console(width=170)
    console.print(table)
    for row in rows:
        if row.figures["errors"]:
            console.print(f"[bold red]errors[/] in {row.name}: {row.figures['errors']}")


def _percentiles(figures: Figures, name: str) -> str:
    values = (figures[f"{name}_p{percent}_ms"] for percent in (50, 99))
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()

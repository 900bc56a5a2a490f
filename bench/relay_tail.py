"""`python -m bench.relay_tail`: how long tokens take from the end of their step to the client, and above all the slowest of them.

The real gateway and workers; steps take a told time and compute nothing (`bench.relay`). Requests come at random moments, so what
one costs the processes shows in the tokens of the others.
"""

import argparse
import asyncio
import bisect
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench.figures import percentile
from bench.generator_pool import generator_pool
from bench.loads import ClosedLoop, Extent, PoissonArrivals
from bench.options import new_parser
from bench.records import Record
from bench.relay import FEW_TOKENS, VOCABULARY_SIZE, WARMUP_S, suite

PERCENTS = (50, 90, 99, 99.8, 100)


def main() -> None:
    parser = new_parser("relay_tail", "From the end of a decode step to its tokens' arrival at the client, without a model.")
    parser.add_argument("--step-ms", type=float, default=15.0, help="time of a decode step")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each run")
    parser.add_argument("--runs", type=int, default=5, help="runs, each with other arrivals")
    parser.add_argument("--processes", type=int, default=1, help="processes that send")
    parser.add_argument("--gateway-core", type=int, help="the gateway's core, which nothing else here then uses")
    parser.add_argument("--json", type=Path, help="write the delays here, in milliseconds, a list for each run")
    arguments = parser.parse_args()
    runs = measure(arguments)
    report(runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs))


def measure(arguments: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of each token, sorted, by run."""
    with tempfile.TemporaryDirectory() as directory:
        ends = Path(directory, "step_ends.json")
        keep_off(arguments.gateway_core)
        with suite(arguments.step_ms, 0.0, ends) as measured:
            if arguments.gateway_core is not None:
                move(measured.processes["gateway"], arguments.gateway_core)
            runs = asyncio.run(_load(measured.address, arguments))
        ends_ns = json.loads(ends.read_text())
    return [sorted(delays_ms(records, [(end - begin_ns) // 1000 for end in ends_ns])) for begin_ns, records in runs]


def keep_off(core: int | None) -> None:
    """Leaves a core to others; what is started from here on inherits that."""
    if core is not None:
        psutil.Process().cpu_affinity(sorted(os.sched_getaffinity(0) - {core}))


def move(process: psutil.Process, core: int) -> None:
    """All threads of a process go to a core."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})


async def _load(address: str, arguments: argparse.Namespace) -> list[tuple[int, list[Record]]]:
    """Each run's beginning, and what was sent after its warm-up and ended well."""
    runs = []
    async with generator_pool({"address": address}, arguments.processes, VOCABULARY_SIZE, drain_s=10.0) as pool:
        await pool.run(ClosedLoop(arguments.prompt, FEW_TOKENS, 1), Extent(num_requests=20), seed=0)
        for seed in range(1, arguments.runs + 1):
            load = PoissonArrivals(arguments.prompt, arguments.tokens, arguments.rate)
            measurement = await pool.run(load, Extent(seconds=arguments.seconds), seed)
            records = [record for record in measurement.records if record.ok and record.sent_us >= WARMUP_S * 1e6]
            runs.append((pool.begin_ns, records))
    return runs


def delays_ms(records: Sequence[Record], step_ends_us: Sequence[int]) -> Iterator[float]:
    """From a step's end to the arrival of its tokens. The first token of a request is no decode step's; the others are those of
    consecutive steps, of which the first is the latest that lets none arrive before its step has ended."""
    for record in records:
        arrivals = list(_token_arrivals_us(record))[1:]
        latest = [bisect.bisect_right(step_ends_us, moment) - 1 for moment in arrivals]
        first = min((step - number for number, step in enumerate(latest)), default=0)
        for number, moment in enumerate(arrivals):
            yield (moment - step_ends_us[first + number]) / 1e3


def _token_arrivals_us(record: Record) -> Iterator[int]:
    return itertools.chain.from_iterable(
        itertools.repeat(moment, count) for moment, count in zip(record.arrivals_us, record.counts, strict=True)
    )


def report(runs: Sequence[Sequence[float]]) -> None:
    table = Table(title="from the end of a step to the client, ms")
    for heading in ("run", "tokens", *(f"p{percent}" for percent in PERCENTS[:-1]), "max"):
        table.add_column(heading, justify="right")
    rows = [[percentile(run, percent) for percent in PERCENTS] for run in runs]
    for number, (run, row) in enumerate(zip(runs, rows, strict=True), 1):
        table.add_row(str(number), f"{len(run):,}", *(f"{value:.2f}" for value in row))
    medians = (statistics.median(column) for column in zip(*rows, strict=True))
    table.add_row("median", "", *(f"{value:.2f}" for value in medians))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""`python -m bench.relay`: what a token costs the gateway. Workers without a model, one gateway process, sending processes.

On a machine with few cores the rate is that of all processes together; the gateway's CPU time per token is its own.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table

from bench.figures import Figures, Objective, figures_of
from bench.generator_pool import generator_pool
from bench.loads import ClosedLoop, Extent
from bench.options import new_parser
from bench.suite import wait_until_ready
from tandem.addresses import free_port
from tandem.models import resolve_model

MODEL = "random:tiny"
VOCABULARY_SIZE = 512


@dataclass(frozen=True)
class Workers:
    """Both workers, in one process."""

    prefill_address: str
    decode_address: str
    process: psutil.Process


@dataclass(frozen=True)
class Gateway:
    """A gateway in a process of its own."""

    address: str
    process: psutil.Process


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = new_parser("relay", "What a token costs the gateway: workers without a model, one gateway process, sending processes.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256], help="streams at once, a load each")
    parser.add_argument("--step-ms", type=float, default=6.0, help="time between a stream's tokens; 0: as fast as it goes")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each load; its first half second is not counted")
    parser.add_argument("--processes", type=int, default=1, help="processes that send")
    parser.add_argument("--no-follow", action="store_true", help="a decode worker that sends each token as a message of its own")
    arguments = parser.parse_args()
    with workers(arguments.step_ms, not arguments.no_follow) as behind, gateway(behind) as served:
        rows = asyncio.run(measure(served, behind, arguments))
    report(rows, arguments.step_ms)


@contextlib.contextmanager
def workers(step_ms: float, follow: bool) -> Iterator[Workers]:
    command = [sys.executable, "-m", "bench.relay_workers", resolve_model(MODEL).digest, str(step_ms), str(int(follow))]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None, "made with pipes"
    try:
        prefill, decode = child.stdout.readline().split()
        yield Workers(prefill, decode, psutil.Process(child.pid))
    finally:
        child.stdin.close()
        child.wait()


@contextlib.contextmanager
def gateway(behind: Workers) -> Iterator[Gateway]:
    port = free_port("127.0.0.1")
    targets = ("--prefill-targets", behind.prefill_address, "--decode-targets", behind.decode_address)
    flags = ("--model", MODEL, "--port", str(port), *targets)
    child = subprocess.Popen([sys.executable, "-m", "gateway", *flags])
    try:
        wait_until_ready(f"127.0.0.1:{port}", child)
        yield Gateway(f"127.0.0.1:{port}", psutil.Process(child.pid))
    finally:
        child.terminate()
        child.wait()


async def measure(served: Gateway, behind: Workers, arguments: argparse.Namespace) -> dict[int, Figures]:
    rows = {}
    extent = Extent(seconds=arguments.seconds, warmup_s=0.5)
    target = {"address": served.address}
    async with generator_pool(target, arguments.processes, VOCABULARY_SIZE, drain_s=10.0) as pool:
        for streams in arguments.streams:
            before_s = [cpu_s(process) for process in (served.process, behind.process)]
            measurement = await pool.run(ClosedLoop(16, arguments.tokens, streams), extent, seed=streams)
            spent_s, worker_s = (
                cpu_s(process) - before for process, before in zip((served.process, behind.process), before_s, strict=True)
            )
            num_tokens = sum(sum(record.counts) for record in measurement.records)
            num_messages = sum(len(record.counts) for record in measurement.records)
            costs = {
                "us_per_token": 1e6 * spent_s / num_tokens,
                "worker_us_per_token": 1e6 * worker_s / num_tokens,
                "tokens_per_message": num_tokens / num_messages,
            }
            rows[streams] = {**figures_of(measurement, extent, Objective()), **costs, "busy": spent_s / arguments.seconds}
    return rows


def report(rows: dict[int, Figures], step_ms: float) -> None:
    table = Table(title=f"the gateway alone, a token a stream every {step_ms:g} ms")
    headings = (
        "streams",
        "tok/s",
        "of ideal",
        "gateway us/token",
        "gateway busy",
        "workers us/token",
        "tokens/message",
        "ITL p50/p99/max ms",
        "sender lag p99 ms",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for streams, row in rows.items():
        ideal = row["output_tokens_per_second"] * step_ms / 1e3 / streams
        table.add_row(
            str(streams),
            f"{row['output_tokens_per_second']:,.0f}",
            f"{100 * ideal:.0f} %" if step_ms else "-",
            f"{row['us_per_token']:.0f}",
            f"{100 * row['busy']:.0f} %",
            f"{row['worker_us_per_token']:.0f}",
            f"{row['tokens_per_message']:.2f}",
            " / ".join("-" if row[key] is None else f"{row[key]:.1f}" for key in ("itl_p50_ms", "itl_p99_ms", "itl_max_ms")),
            f"{row['generator_lag_p99_ms']:.1f}",
        )
    console = Console(width=150)
    console.print(table)
    for streams, row in rows.items():
        if row["errors"]:
            console.print(f"[bold red]errors[/] at {streams} streams: {row['errors']}")


if __name__ == "__main__":
    main()

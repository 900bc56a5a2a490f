"""`python -m bench.serve`: a whole suite under load, through its gateway. Prints tables, writes JSON and a plot.

Without --address it starts a suite of its own (`tandem up`) and stops it again. With --openai it measures any server with OpenAI's
completions API instead, with --beside both, load by load in turns.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.figures import Figures, Objective, figures_of, parse_objective
from bench.generator_pool import GeneratorPool, default_num_processes, generator_pool
from bench.loads import ClosedLoop, Extent, Load, parse_load
from bench.options import new_parser
from bench.plot import write_plot
from bench.presets import PRESETS
from bench.report import print_goals, print_ratios, print_table, write_json
from bench.suite import describe, suite_at

DEFAULT_LOADS = ("256/128/1", "256/128/4", "256/128/16", "1024/64/1", "1024/64/16")
DEFAULT_VOCABULARY_SIZE = 32_000
# A server's first requests compile, allocate and connect.
FIRST_LOADS = (ClosedLoop(64, 8, 2), ClosedLoop(512, 16, 4))


@dataclass
class Server:
    """A server that is measured, and its figures by load."""

    name: str
    title: str
    pool: GeneratorPool
    rows: dict[str, Figures] = field(default_factory=dict)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.openai and not arguments.beside:
        asyncio.run(measure(arguments, address=None))
        return
    with suite_at(arguments.address, arguments.up) as address:
        asyncio.run(measure(arguments, address))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("serve", "Measures a suite, or another server, under load.")
    parser.add_argument("--address", help="gateway of a running suite; by default one is started")
    parser.add_argument("--up", nargs=argparse.REMAINDER, default=[], help="arguments for the `tandem up` that is started; last")
    parser.add_argument("--loads", type=parse_load, nargs="+", help="IN/OUT/STREAMS, IN/OUT@RATE, trace:FILE[@SPEED[xLENGTHS]]")
    parser.add_argument("--preset", choices=PRESETS, help="the loads, extent, objective and goals of a page of figures")
    parser.add_argument("--seconds", type=float, default=0.0, help="length of each load; 0: by number of requests")
    parser.add_argument("--requests", type=int, default=0, help="requests per load; 0: four per stream, at least 6")
    parser.add_argument("--warmup", type=float, default=None, help="seconds at the beginning of each load that are not counted")
    parser.add_argument("--drain", type=float, default=10.0, help="seconds that requests get to end after --seconds")
    parser.add_argument("--slo", type=parse_objective, help="objective for goodput, in seconds: ttft=0.2,tpot=0.02,itl=0.05")
    parser.add_argument("--processes", type=int, default=default_num_processes(), help="processes that send")
    parser.add_argument("--openai", help="URL of a server with OpenAI's API to measure, http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="the model's name there")
    parser.add_argument("--vocabulary", type=int, default=DEFAULT_VOCABULARY_SIZE, help="token ids there, if it is measured alone")
    parser.add_argument("--text", action="store_true", help="send words there instead of token ids")
    parser.add_argument("--beside", action="store_true", help="measure the suite and the --openai server in turns")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for JSON and plots")
    arguments = parser.parse_args(argv)
    if arguments.beside and not arguments.openai:
        parser.error("--beside needs --openai")
    return arguments


def plan(arguments: argparse.Namespace) -> tuple[Sequence[Load], Extent, Objective]:
    """What was asked for, with a preset's values where nothing else was said."""
    preset = PRESETS.get(arguments.preset)
    loads = arguments.loads or (preset.loads if preset else [parse_load(text) for text in DEFAULT_LOADS])
    by_number = bool(arguments.requests) and not arguments.seconds
    seconds = arguments.seconds or (preset.extent.seconds if preset and not by_number else 0.0)
    warmup_s = arguments.warmup if arguments.warmup is not None else (preset.extent.warmup_s if preset and seconds else 0.0)
    if seconds and warmup_s >= seconds:
        raise SystemExit(f"--warmup {warmup_s:g} leaves nothing of --seconds {seconds:g}")
    return loads, Extent(seconds, arguments.requests, warmup_s), arguments.slo or (preset.objective if preset else Objective())


async def measure(arguments: argparse.Namespace, address: str | None) -> None:
    loads, extent, objective = plan(arguments)
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(each) for each in await connections(arguments, address)]
        await warm_up(servers, arguments.seed)
        await measure_all(servers, loads, extent, objective, arguments.seed)
    report(arguments, servers, loads, extent, objective)


async def connections(
    arguments: argparse.Namespace, address: str | None
) -> Sequence["contextlib.AbstractAsyncContextManager[Server]"]:
    found, vocabulary_size = [], arguments.vocabulary
    if address is not None:
        facts = await describe(address)
        vocabulary_size = facts.vocabulary_size
        title = f"{facts.model} — prefill {facts.prefill}; decode {facts.decode}"
        found.append(connected("tandem", title, {"address": address}, vocabulary_size, arguments))
    if arguments.openai:
        from bench.openai_client import OpenAiTarget, negotiate

        target = await negotiate(OpenAiTarget(arguments.openai, arguments.model, arguments.text), vocabulary_size)
        title = f"{arguments.model or 'model'} at {arguments.openai} (takes {', '.join(target.extras) or 'no extras'})"
        found.append(connected("openai", title, asdict(target), vocabulary_size, arguments))
    return found


@contextlib.asynccontextmanager
async def connected(
    name: str, title: str, target: Mapping[str, Any], vocabulary_size: int, arguments: argparse.Namespace
) -> AsyncIterator[Server]:
    async with generator_pool(target, arguments.processes, vocabulary_size, arguments.drain) as pool:
        yield Server(name, title, pool)


async def warm_up(servers: Sequence[Server], seed: int) -> None:
    for server in servers:
        for number, first in enumerate(FIRST_LOADS):
            await server.pool.run(first, Extent(), seed + 1000 + number)


async def measure_all(servers: Sequence[Server], loads: Sequence[Load], extent: Extent, objective: Objective, seed: int) -> None:
    """Fills the servers' rows: each load at each server before the next load, which of them is first in turns."""
    with Progress(transient=True) as progress:
        task = progress.add_task("loads", total=len(loads) * len(servers))
        for number, load in enumerate(loads):
            for server in servers if number % 2 == 0 else reversed(servers):
                progress.update(task, description=f"{server.name}: {load.name}")
                measurement = await server.pool.run(load, extent, seed + number)
                server.rows[load.name] = figures_of(measurement, extent, objective)
                progress.advance(task)


def report(
    arguments: argparse.Namespace, servers: Sequence[Server], loads: Sequence[Load], extent: Extent, objective: Objective
) -> None:
    for server in servers:
        print_table(server.rows, server.title)
    if len(servers) == 2:
        print_ratios(servers[0].rows, servers[1].rows, servers[1].title)
    if arguments.preset:
        print_goals(servers[0].rows, PRESETS[arguments.preset].goals)
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {
        "servers": {server.name: server.title for server in servers},
        "extent": asdict(extent),
        "objective": asdict(objective),
        "seed": arguments.seed,
        "processes": arguments.processes,
    }
    write_json(arguments.output / "serve.json", {server.name: server.rows for server in servers}, about)
    plotted = write_plot(arguments.output / "serve.png", {server.name: server.rows for server in servers}, loads, objective)
    files = [f"{arguments.output}/serve.json", f"{arguments.output}/serve.png" if plotted else "no plot, for lack of matplotlib"]
    print(f"written: {', '.join(files)}")


if __name__ == "__main__":
    main()

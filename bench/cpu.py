"""`python -m bench.cpu`: the suite on a CPU beside other servers of the same model file, load by load in turns.

Peers that are not installed are left out with a word on how to get them; any other running server joins with --openai. Nothing else
should run. With both peers on two cores, `--requests 16` keeps it short.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cpu_floors import Floors, measure_floors
from bench.cpu_report import COMPARED, Alone, CpuReport, Footprint, alone
from bench.cpu_step import Steps, measure_steps
from bench.figures import figures_of
from bench.generator import Clock
from bench.loads import ClosedLoop, Extent, Load, parse_load
from bench.options import new_parser
from bench.peers import PEERS, Peer, installed, place_for, running
from bench.presets import CPU
from bench.process_memory import memory_of
from bench.records import Record
from bench.report import print_goals, print_table, write_json
from bench.serve import Server, connected
from bench.suite import SuiteFacts, describe, own_suite
from bench.tandem_client import TandemClient
from llm.weight_format import FORMATS
from tandem.cores import num_usable_cores
from tandem.models import DEFAULT_MODEL, ModelError, ModelFiles, resolve_model

# On a CPU even the longest first request is short beside what is measured.
FIRST_LOAD = ClosedLoop(256, 8, 1)
_PRIORITY = -10
MOST_ALONE = 4
"""Requests of a load of one stream, which differ little."""


@dataclass
class Running:
    """A server that takes requests now; `process_id` if it was started here."""

    name: str
    url: str
    process_id: int | None = None
    footprint: Footprint = field(default_factory=Footprint)

    def loaded(self) -> None:
        """Notes its memory; more than before, since no server gives any back."""
        if self.process_id is not None:
            self.footprint.loaded = memory_of(self.process_id)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    try:
        files = resolve_model(arguments.model)
    except ModelError as error:
        sys.exit(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(peers_at(arguments, files))
        floors = measure_floors(files, arguments.threads)  # peers are idle
        suite = stack.enter_context(suite_running(arguments))
        facts = asyncio.run(describe(suite.url))
        with ahead_of_servers():
            servers = asyncio.run(measure(arguments, facts, suite, peers))
    footprints = {each.name: each.footprint for each in (suite, *peers)}
    report(arguments, servers, footprints, facts, floors)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("cpu", "Measures the suite on a CPU, beside other servers of the same model file.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="peers read GGUF files only")
    parser.add_argument("--loads", type=parse_load, nargs="+", default=list(CPU.loads), help="IN/OUT/STREAMS")
    parser.add_argument(
        "--requests", type=int, default=0, help=f"requests per load, of one stream at most {MOST_ALONE}; 0: four per stream"
    )
    parser.add_argument("--threads", type=int, default=num_usable_cores(), help="threads of each peer, and of the floors")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that peers are installed in")
    parser.add_argument("--no-peers", action="store_true", help="start none")
    parser.add_argument("--openai", nargs="+", default=[], metavar="NAME=URL", help="servers that run already")
    parser.add_argument("--weights", default="auto", help="ours, for both roles; auto is what a user gets")
    parser.add_argument("--address", help="gateway of a running suite; by default one is started")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for JSON and the peers' logs")
    parser.add_argument("--up", nargs=argparse.REMAINDER, default=[], help="arguments for the `tandem up` that is started; last")
    return parser.parse_args(argv)


def ours(arguments: argparse.Namespace) -> Sequence[str]:
    """What our suite is told."""
    return ("--model", arguments.model, "--weights", arguments.weights, *arguments.up)


@contextlib.contextmanager
def peers_at(arguments: argparse.Namespace, files: ModelFiles) -> Iterator[list[Running]]:
    """All that can be had: those named, and those that are installed, started one after the other."""
    found = [Running(*each.partition("=")[::2]) for each in arguments.openai]
    with contextlib.ExitStack() as stack:
        for peer in [] if arguments.no_peers else _startable(arguments, files):
            assert files.path is not None, "only a file is given to peers"
            place = place_for(arguments.peer_python, files.path, arguments.threads)
            log = arguments.output / f"{peer.engine}.log"
            started = stack.enter_context(running(peer, place, log))
            footprint = Footprint(started.start_s, memory_of(started.process_id))
            found.append(Running(peer.name, started.url, started.process_id, footprint))
            print(f"{peer.name}: started in {started.start_s:.1f} s", flush=True)
        yield found


def _startable(arguments: argparse.Namespace, files: ModelFiles) -> list[Peer]:
    if files.format != "gguf":
        print(f"no peers: they read GGUF files, {files.name} is none")
        return []
    return installed(PEERS, arguments.peer_python)


@contextlib.contextmanager
def suite_running(arguments: argparse.Namespace) -> Iterator[Running]:
    """The one that was named, or one that is started: twice, so that the second start finds all in the cache."""
    if arguments.address:
        yield Running("tandem", arguments.address)
        return
    with own_suite(ours(arguments)):
        pass
    with own_suite(ours(arguments)) as suite:
        start_s = suite.start_s + asyncio.run(first_answer_s(suite.address))
        yield Running("tandem", suite.address, suite.process_id, Footprint(start_s, memory_of(suite.process_id)))


@contextlib.contextmanager
def ahead_of_servers() -> Iterator[None]:
    """What is started within comes before servers that fill all cores, where we may say so: a late sender tells nothing."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


async def first_answer_s(address: str) -> float:
    """Asks for one token, as the peers are asked at their start. SystemExit if none comes."""
    client, record, clock = TandemClient(address), Record(0, 2, 0), Clock(time.monotonic_ns())
    try:
        await client.send([200, 201], 1, record, clock)
    finally:
        await client.close()
    if record.error:
        raise SystemExit(f"the suite's first answer is {record.error}")
    return clock.now_us() / 1e6


async def measure(arguments: argparse.Namespace, facts: SuiteFacts, suite: Running, peers: Sequence[Running]) -> list[Server]:
    title = f"Tandem: {facts.model} — prefill {facts.prefill}; decode {facts.decode}"
    targets = {"tandem": (title, {"address": suite.url})}
    for peer in peers:
        targets[peer.name] = await _target(peer, arguments.model, facts.vocabulary_size)
    async with _connections(targets, facts.vocabulary_size) as servers:
        for server in servers:
            await server.pool.run(FIRST_LOAD, Extent(num_requests=2), arguments.seed + 1000)
        for number, load in enumerate(arguments.loads):
            turns = list(zip(servers, (suite, *peers), strict=True))
            for server, process in turns if number % 2 == 0 else reversed(turns):
                await _measure_load(server, load, arguments.requests, arguments.seed + number)
                process.loaded()
    return servers


async def _target(peer: Running, model: str, vocabulary_size: int) -> tuple[str, Mapping[str, Any]]:
    from bench.openai_client import OpenAiTarget, negotiate

    target = await negotiate(OpenAiTarget(peer.url, model), vocabulary_size)
    return f"{peer.name} (takes {', '.join(target.extras) or 'no extras'})", asdict(target)


@contextlib.asynccontextmanager
async def _connections(targets: Mapping[str, tuple[str, Mapping[str, Any]]], vocabulary_size: int) -> AsyncIterator[list[Server]]:
    options = argparse.Namespace(processes=1, drain=10.0)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(connected(name, title, target, vocabulary_size, options))
            for name, (title, target) in targets.items()
        ]


async def _measure_load(server: Server, load: Load, requests: int, seed: int) -> None:
    if isinstance(load, ClosedLoop) and load.streams == 1:
        requests = min(requests or MOST_ALONE, MOST_ALONE)
    extent = Extent(num_requests=requests)
    began = time.monotonic()
    figures = figures_of(await server.pool.run(load, extent, seed), extent, CPU.objective)
    server.rows[load.name] = figures
    seen = ", ".join(f"{heading} {figures[key]:.1f}" for key, heading in COMPARED.items() if figures[key] is not None)
    print(f"{server.name}: {load.name}: {seen} ({time.monotonic() - began:.0f} s)", flush=True)


def report(
    arguments: argparse.Namespace, servers: Sequence[Server], footprints: Mapping[str, Footprint], facts: SuiteFacts, floors: Floors
) -> None:
    for server in servers:
        print_table(server.rows, server.title)
    ours = servers[0].rows
    print_goals(ours, [goal for goal in CPU.goals if goal.load in ours])
    steps_alone = measure_alone(arguments, facts.formats, floors)
    rows = {server.name: server.rows for server in servers}
    loads = [load for load in arguments.loads if isinstance(load, ClosedLoop)]
    found = CpuReport(rows, footprints, facts.formats, floors, steps_alone, loads)
    found.print()
    about: dict[str, Any] = {
        "servers": {server.name: server.title for server in servers},
        "floors": asdict(floors),
        "alone": [asdict(each) for each in steps_alone],
        "footprints": {name: asdict(each) for name, each in footprints.items()},
        **found.as_json(),
        "seed": arguments.seed,
    }
    write_json(arguments.output / "cpu.json", rows, about)
    print(f"written: {arguments.output}/cpu.json")


def measure_alone(arguments: argparse.Namespace, formats: tuple[str, str], floors: Floors) -> list[Alone]:
    """Each role's steps with its own weights, once the servers have ended."""
    steps = {
        "prefill": Steps(arguments.model, arguments.threads, decode=()),
        "decode": Steps(arguments.model, arguments.threads, prefill=()),
    }
    found = []
    for (role, wanted), format in zip(steps.items(), formats, strict=True):
        known = next(each for each in FORMATS if each == format)
        print(f"{role} steps alone, {format} weights …", flush=True)
        found += [alone(figure.name, format, figure, floors, wanted.context) for figure in measure_steps(wanted, known)]
    return found


if __name__ == "__main__":
    main()

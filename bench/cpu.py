"""`python -m bench.cpu`: the suite on a CPU beside other servers of the same model file, load by load in turns.

Peers that are not installed are left out with a word on how to get them; any other running server joins with --openai.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cpu_floors import Floors, measure_floors
from bench.loads import ClosedLoop, Extent, Load, parse_load
from bench.peers import PEERS, Peer, place_for, running
from bench.presets import CPU
from bench.report import print_goals, print_ratios, print_table, write_json
from bench.serve import Server, connected, measure_all
from bench.suite import describe, suite_at
from tandem.models import DEFAULT_MODEL, ModelError, ModelFiles, resolve_model

# On a CPU even the longest first request is short beside what is measured.
FIRST_LOAD = ClosedLoop(256, 8, 1)


@dataclass(frozen=True)
class Running:
    """A server that takes requests now."""

    name: str
    url: str


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    try:
        files = resolve_model(arguments.model)
    except ModelError as error:
        sys.exit(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    floors = measure_floors(files, arguments.threads)
    with peers_at(arguments, files) as peers, suite_at(arguments.address, ours(arguments)) as address:
        servers = asyncio.run(measure(arguments, address, peers))
    report(arguments, servers, floors)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the suite on a CPU, beside other servers.")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--loads", type=parse_load, nargs="+", default=list(CPU.loads), help="IN/OUT/STREAMS")
    parser.add_argument("--requests", type=int, default=0, help="requests per load; 0: four per stream, at least 6")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each peer, and of the floors")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that peers are installed in")
    parser.add_argument("--no-peers", action="store_true", help="start none")
    parser.add_argument("--openai", nargs="+", default=[], metavar="NAME=URL", help="servers that run already")
    parser.add_argument(
        "--weights", default="int4", help="ours: peers multiply four-bit weights by eight-bit numbers, as int4 does"
    )
    parser.add_argument("--address", help="gateway of a running suite; by default one is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--up", nargs=argparse.REMAINDER, default=[], help="arguments for the `tandem up` that is started; last")
    return parser.parse_args(argv)


def ours(arguments: argparse.Namespace) -> Sequence[str]:
    """What our suite is told."""
    return ("--model", arguments.model, "--weights", arguments.weights, *arguments.up)


@contextlib.contextmanager
def peers_at(arguments: argparse.Namespace, files: ModelFiles) -> Iterator[list[Running]]:
    """All that can be had: those named, and those that are installed, started."""
    found = [Running(*each.partition("=")[::2]) for each in arguments.openai]
    with contextlib.ExitStack() as stack:
        for peer in [] if arguments.no_peers else _startable(arguments, files):
            assert files.path is not None, "only a file is given to peers"
            place = place_for(arguments.peer_python, files.path, arguments.threads)
            log = arguments.output / f"{peer.name.partition(' ')[0]}.log"
            found.append(Running(peer.name, stack.enter_context(running(peer, place, log))))
        yield found


def _startable(arguments: argparse.Namespace, files: ModelFiles) -> list[Peer]:
    if files.format != "gguf":
        print(f"no peers: they read GGUF files, {files.name} is none")
        return []
    for peer in PEERS:
        if not peer.installed(arguments.peer_python):
            print(f"left out: {peer.name} is not installed ({peer.hint}; another Python: --peer-python)")
    return [peer for peer in PEERS if peer.installed(arguments.peer_python)][:1]


async def measure(arguments: argparse.Namespace, address: str, peers: Sequence[Running]) -> list[Server]:
    from bench.openai_client import OpenAiTarget, negotiate

    facts = await describe(address)
    options = argparse.Namespace(processes=1, drain=10.0)
    title = f"Tandem: {facts.model} — prefill {facts.prefill}; decode {facts.decode}"
    found = [connected("tandem", title, {"address": address}, facts.vocabulary_size, options)]
    for peer in peers:
        target = await negotiate(OpenAiTarget(peer.url, arguments.model), facts.vocabulary_size)
        title = f"{peer.name} (takes {', '.join(target.extras) or 'no extras'})"
        found.append(connected(peer.name, title, asdict(target), facts.vocabulary_size, options))
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(each) for each in found]
        for server in servers:
            await server.pool.run(FIRST_LOAD, Extent(num_requests=2), arguments.seed + 1000)
        await measure_all(servers, arguments.loads, Extent(num_requests=arguments.requests), CPU.objective, arguments.seed)
    return servers


def report(arguments: argparse.Namespace, servers: Sequence[Server], floors: Floors) -> None:
    ours, *peers = servers
    for server in servers:
        print_table(server.rows, server.title)
    for peer in peers:
        print_ratios(ours.rows, peer.rows, peer.name)
    print_goals(ours.rows, [goal for goal in CPU.goals if goal.load in ours.rows])
    floors.print(ours.rows, _closed(arguments.loads))
    about: dict[str, Any] = {
        "servers": {server.name: server.title for server in servers},
        "floors": asdict(floors),
        "seed": arguments.seed,
    }
    write_json(arguments.output / "cpu.json", {server.name: server.rows for server in servers}, about)
    print(f"written: {arguments.output}/cpu.json")


def _closed(loads: Sequence[Load]) -> list[Any]:
    return [load for load in loads if load.kind == "closed"]


if __name__ == "__main__":
    main()

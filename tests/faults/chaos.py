"""`make chaos`: the real suite under the load of a trace, while its processes are killed, frozen, drained and cut off by seed.

Prints a one-screen verdict and exits with 0 if every invariant held and no client saw an error. A failing run says how to repeat
it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from tests.faults import network
from tests.faults.injector import KINDS, plan_of
from tests.faults.members import FAKE_MODEL, Shape
from tests.faults.oracle import Run
from tests.faults.run import Progress, Runner, Settings, log_directory
from tests.faults.suite import Suite
from tests.faults.traffic import Scale
from tests.faults.verdict import passed, print_verdict

REAL_FLAGS = {kind: ("--dtype", "float32", "--threads", "1") for kind in ("prefill", "decode")}


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    settings = settings_of(arguments)
    with hosts(arguments.namespaces) as net:
        run = asyncio.run(chaos(settings, net, arguments.logs))
    replay = shlex.join(["make", "chaos", f"ARGS={shlex.join(sys.argv[1:] or ['--seed', '0'])}"])
    print_verdict(run, title(settings, net), f"{replay}  (logs: {arguments.logs})")
    raise SystemExit(not passed(run))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description="Harms a suite under load and checks invariants I1 to I10.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", default=FAKE_MODEL, help="fake (a function in place of a model; restarts quickly) or a model's name"
    )
    parser.add_argument(
        "--faults", nargs="+", default=["kill", "freeze", "drain", "cut"], help=f"of {', '.join(KINDS)}, or first words"
    )
    parser.add_argument("--most-faults", type=int, help="stop after so many")
    parser.add_argument(
        "--pace", type=float, help="how much faster than the trace; by default 3 for the fake model and a quarter for a real one"
    )
    parser.add_argument(
        "--asks", default="", help="one kind of request only: plain, sampled, stop, logprobs, cancel, deadline or bad"
    )
    parser.add_argument("--transports", default="tcp", help="of the KV blocks")
    parser.add_argument(
        "--no-namespaces", dest="namespaces", action="store_false", help="no network namespaces; links go through proxies"
    )
    parser.add_argument("--logs", type=Path, default=log_directory("chaos"))
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> Settings:
    fake = arguments.model == FAKE_MODEL
    shape = Shape(
        model=arguments.model, transports=arguments.transports, flags={} if fake else REAL_FLAGS, kv_blocks=2048 if fake else 512
    )
    real = Scale(longest_prompt=96, longest_completion=24, completion_divisor=8, pace=0.25)
    scale = Scale() if fake else real
    if arguments.pace is not None:
        scale = replace(scale, pace=arguments.pace)
    plan = plan_of(arguments.faults, arguments.most_faults) if arguments.faults != ["none"] else None
    return Settings(arguments.seconds, arguments.seed, shape, scale, plan, arguments.asks)


@contextlib.contextmanager
def hosts(wanted: bool) -> Iterator[network.Network | None]:
    """A network of our own where the machine lets us make one."""
    if not wanted or not network.available():
        yield None
        return
    with network.network() as net:
        yield net


async def chaos(settings: Settings, net: network.Network | None, logs: Path) -> Run:
    progress = Progress()
    async with Suite(settings.shape, logs, net, proxied=net is None) as suite:
        showing = asyncio.create_task(show(progress))
        try:
            return await Runner(settings, suite, net or suite.links, progress).run()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)


async def show(progress: Progress) -> None:
    """A bar, while the run goes on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task("chaos", total=1.0, counts="")
        while True:
            counts = f"{progress.num_requests} requests, {progress.num_faults} faults"
            bar.update(task, description=progress.phase, completed=progress.fraction, counts=counts)
            await asyncio.sleep(0.2)


def title(settings: Settings, net: network.Network | None) -> str:
    links = "network namespaces" if net is not None else "proxies on one host"
    return f"chaos: {settings.shape.model} model, {settings.seconds:.0f} s, seed {settings.seed}, {links}"


if __name__ == "__main__":
    main()

"""`python -m bench.serve`: the whole suite under load, through the gateway. Prints a table, writes JSON and a plot.

Without --address it starts a suite of its own (`tandem up`) and stops it again.
"""

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

from bench.client import Shape, run_shape
from bench.report import Figures, figures_of, print_table, write_json, write_plot
from tandem.addresses import free_port
from tandem.api.v1 import model_pb2, model_pb2_grpc, operations_pb2, operations_pb2_grpc
from tandem.channels import open_channel
from tandem.probe import probe

START_LIMIT_S = 300.0


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    with suite_at(arguments.address, arguments.up) as address:
        rows, about = asyncio.run(measure_all(address, arguments.loads, arguments.requests, arguments.seed))
    print_table(rows, f"{about['model']} — prefill {about['prefill']}; decode {about['decode']}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "serve.json", rows, about)
    plotted = write_plot(arguments.output / "serve.png", rows)
    print(
        f"written: {arguments.output}/serve.json" + (f", {arguments.output}/serve.png" if plotted else " (no matplotlib: no plot)")
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures a suite under closed-loop load.")
    parser.add_argument("--address", help="gateway of a running suite; by default one is started")
    parser.add_argument("--up", nargs=argparse.REMAINDER, default=[], help="arguments for the `tandem up` that is started; last")
    parser.add_argument("--loads", type=parse_shape, nargs="+", default=[parse_shape(text) for text in DEFAULT_LOADS])
    parser.add_argument("--requests", type=int, default=0, help="requests per load; 0: four per stream, at least 6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    return parser.parse_args(argv)


DEFAULT_LOADS = ("256/128/1", "256/128/4", "256/128/16", "1024/64/1", "1024/64/16")


def parse_shape(text: str) -> Shape:
    """IN/OUT/STREAMS, as 256/128/16."""
    try:
        return Shape(*(int(part) for part in text.split("/")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN/OUT/STREAMS") from error


@contextlib.contextmanager
def suite_at(address: str | None, up_arguments: Sequence[str]) -> Iterator[str]:
    """The address of a serving gateway; of a suite of our own, stopped at the end, if none was given."""
    if address:
        yield address
        return
    port = free_port("127.0.0.1")
    child = subprocess.Popen([sys.executable, "-m", "tandem.cli", "up", "--port", str(port), *up_arguments])
    try:
        wait_until_ready(f"127.0.0.1:{port}", child)
        yield f"127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


def wait_until_ready(address: str, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while probe(address, "gateway.ready") != "SERVING":
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the suite did not start; its own messages say why")
        time.sleep(0.2)


async def measure_all(
    address: str, shapes: Sequence[Shape], num_requests: int, seed: int
) -> tuple[Mapping[str, Figures], dict[str, str]]:
    async with open_channel(address) as channel:
        about, vocabulary_size = await describe(channel)
        await run_shape(channel, Shape(64, 8, 2), 4, vocabulary_size, seed - 1)
        rows = {}
        with Progress(transient=True) as progress:
            task = progress.add_task("loads", total=len(shapes))
            for shape in shapes:
                progress.update(task, description=f"load {shape.name}")
                count = num_requests or max(6, 4 * shape.streams)
                rows[shape.name] = figures_of(shape, await run_shape(channel, shape, count, vocabulary_size, seed))
                progress.advance(task)
    return rows, about


async def describe(channel) -> tuple[dict[str, str], int]:  # type: ignore[no-untyped-def]
    """What is measured, for people, and the model's vocabulary size."""
    model = (await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())).model
    suite = await operations_pb2_grpc.OperationsServiceStub(channel).GetSuite(operations_pb2.GetSuiteRequest())
    about = {"model": model.name}
    for name, role in (("prefill", operations_pb2.WORKER_ROLE_PREFILL), ("decode", operations_pb2.WORKER_ROLE_DECODE)):
        workers = [worker for worker in suite.workers if worker.role == role]
        about[name] = ", ".join(f"{worker.device} {worker.weight_format}" for worker in workers)
    return about, model.vocabulary_size


if __name__ == "__main__":
    main()

"""The suite that is measured: one that runs already, or one of our own."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tandem.addresses import free_port
from tandem.api.v1 import model_pb2, model_pb2_grpc, operations_pb2, operations_pb2_grpc
from tandem.channels import open_channel
from tandem.probe import probe

START_LIMIT_S = 300.0


@dataclass(frozen=True)
class SuiteFacts:
    """What is measured, for people, and the model's vocabulary size."""

    model: str
    prefill: str
    decode: str
    vocabulary_size: int
    formats: tuple[str, str]
    """Weights of prefill and decode; of several workers, the first one's."""


@dataclass(frozen=True)
class OwnSuite:
    """A suite that was started here: its gateway, its supervisor's process, and how long it took until it was ready."""

    address: str
    process_id: int
    start_s: float


@contextlib.contextmanager
def suite_at(address: str | None, up_arguments: Sequence[str]) -> Iterator[str]:
    """The address of a serving gateway; of a suite of our own, stopped at the end, if none was given."""
    if address:
        yield address
        return
    with own_suite(up_arguments) as suite:
        yield suite.address


@contextlib.contextmanager
def own_suite(up_arguments: Sequence[str]) -> Iterator[OwnSuite]:
    """Started, and stopped at the end. SystemExit if it does not start."""
    port, began = free_port("127.0.0.1"), time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "tandem.cli", "up", "--port", str(port), *up_arguments])
    try:
        wait_until_ready(f"127.0.0.1:{port}", child)
        yield OwnSuite(f"127.0.0.1:{port}", child.pid, time.monotonic() - began)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


def wait_until_ready(address: str, child: subprocess.Popen[bytes]) -> None:
    """Returns once the gateway serves. SystemExit if it does not come to that."""
    deadline = time.monotonic() + START_LIMIT_S
    while probe(address, "gateway.ready") != "SERVING":
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the gateway did not start to serve; its own messages say why")
        time.sleep(0.1)


async def describe(address: str) -> SuiteFacts:
    """Asks the gateway."""
    async with open_channel(address) as channel:
        model = (await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())).model
        suite = await operations_pb2_grpc.OperationsServiceStub(channel).GetSuite(operations_pb2.GetSuiteRequest())
    roles = (operations_pb2.WORKER_ROLE_PREFILL, operations_pb2.WORKER_ROLE_DECODE)
    prefill, decode = (
        ", ".join(f"{worker.device} {worker.weight_format}" for worker in suite.workers if worker.role == role) for role in roles
    )
    formats = {worker.role: worker.weight_format for worker in reversed(suite.workers)}
    return SuiteFacts(model.name, prefill, decode, model.vocabulary_size, (formats[roles[0]], formats[roles[1]]))

"""The real suite, as `tandem up` starts it, with the real model."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from tandem.addresses import free_port
from tandem.api.v1 import generation_pb2, generation_pb2_grpc, operations_pb2, operations_pb2_grpc
from tandem.models import DEFAULT_MODEL, ModelError, resolve_model
from tandem.probe import probe

START_LIMIT_S = 180.0


@dataclass(frozen=True)
class Suite:
    """A running suite."""

    process: psutil.Process
    address: str
    channel: grpc.Channel

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def operations(self) -> operations_pb2_grpc.OperationsServiceStub:
        return operations_pb2_grpc.OperationsServiceStub(self.channel)

    def member(self, module: str) -> list[psutil.Process]:
        """The processes that run `python -m module`."""
        return [child for child in self.process.children(recursive=True) if module in child.cmdline()]

    def workers(self) -> list[operations_pb2.WorkerSummary]:
        return list(self.operations.GetSuite(operations_pb2.GetSuiteRequest(), timeout=5).workers)

    def wait_blocks_free(self, limit_s: float) -> None:
        """Every worker says that all its blocks are free; states travel once a second when nothing changes."""
        deadline = time.monotonic() + limit_s
        while any(worker.free_blocks != worker.total_blocks for worker in self.workers()):
            assert time.monotonic() < deadline, self.workers()
            time.sleep(0.02)


StartSuite = Callable[..., Suite]


def start(*arguments: str, **environment: str) -> Suite:
    """`tandem up` with arguments and TANDEM_ variables; returns once it serves."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "tandem.cli", "up", "--port", str(port), "--verbose", *arguments]
    process = psutil.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + START_LIMIT_S
    while probe(f"127.0.0.1:{port}", "gateway.ready") != "SERVING":
        assert process.is_running() and time.monotonic() < deadline, "the suite did not start"
        time.sleep(0.1)
    suite = Suite(process, f"127.0.0.1:{port}", grpc.insecure_channel(f"127.0.0.1:{port}"))
    counts = [int(value) for flag, value in itertools.pairwise(arguments) if flag in ("--prefill", "--decode")]
    expected = 2 + sum(counts) - len(counts)
    while sum(worker.ready for worker in suite.workers()) < expected:
        assert time.monotonic() < deadline, suite.workers()
        time.sleep(0.1)
    return suite


def stop(suite: Suite) -> int:
    """Ends the suite as Ctrl-C would; its exit code."""
    children = suite.process.children(recursive=True)
    suite.channel.close()
    suite.process.send_signal(signal.SIGTERM)
    code = suite.process.wait(60)
    assert not [child for child in children if child.is_running()], "a child outlived the suite"
    return int(code)


@pytest.fixture(scope="session", autouse=True)
def real_model() -> None:
    try:
        resolve_model(DEFAULT_MODEL, download=False)
    except ModelError as error:
        pytest.fail(f"the default model is not in the cache; `tandem pull` fetches it: {error}")


@pytest.fixture(scope="session")
def reference(repository: Path) -> list[dict]:  # type: ignore[type-arg]
    """Prompts with their 32 greedy tokens in float32 and the first step's five greatest logits."""
    return json.loads((repository / "tests/data/smollm2_greedy.json").read_text())["prompts"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exact_suite() -> Iterator[Suite]:
    """One worker of each kind, float32."""
    suite = start("--dtype", "float32")
    yield suite
    assert stop(suite) == 0


def greedy(ids: list[int] | None = None, max_tokens: int = 32, **fields: object) -> generation_pb2.GenerateRequest:
    """A greedy request that runs past end tokens."""
    values: dict[str, object] = {
        "sampling": generation_pb2.SamplingParams(temperature=0),
        "stopping": generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        **({"token_ids": generation_pb2.TokenIds(ids=ids)} if ids is not None else {}),
    }
    return generation_pb2.GenerateRequest(**{**values, **fields})


def collect(responses: Iterator[generation_pb2.GenerateResponse]) -> tuple[list[int], str, generation_pb2.Finished]:
    """Tokens, text and the last message of a stream, its indexes checked."""
    tokens: list[int] = []
    text, finished = "", None
    for response in responses:
        assert finished is None, "something came after the last message"
        if response.HasField("finished"):
            finished = response.finished
            continue
        assert response.delta.index == len(tokens)
        tokens += response.delta.token_ids
        text += response.delta.text
    assert finished is not None
    assert finished.usage.completion_tokens == len(tokens)
    return tokens, text, finished

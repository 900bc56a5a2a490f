"""The load: arrivals of a real trace, requests by seed, and a client that writes down what it sees."""

from __future__ import annotations

import asyncio
import csv
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.errors import from_rpc_error
from tests.faults.oracle import Expected, Record

TRACE = Path(__file__).resolve().parents[1] / "data" / "azure_conversation_excerpt.csv"
DEADLINE_S = 30.0
KINDS = (("plain", 50), ("sampled", 15), ("stop", 10), ("logprobs", 10), ("cancel", 10), ("deadline", 3), ("bad", 2))


@dataclass(frozen=True)
class Arrival:
    """A request of the trace: seconds after the start, and lengths in tokens."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Scale:
    """How the trace's lengths become ours, and how much faster its clock runs."""

    prompt_divisor: int = 12
    completion_divisor: int = 4
    longest_prompt: int = 180
    longest_completion: int = 60
    pace: float = 3.0


@dataclass(frozen=True)
class Asked:
    """A request to send. `cancel_after`: tokens after which the client goes away; None: never."""

    number: int
    kind: str
    request: generation_pb2.GenerateRequest
    expected: Expected | None
    deadline_s: float = DEADLINE_S
    cancel_after: int | None = None


def arrivals(seconds: float, scale: Scale, path: Path = TRACE) -> list[Arrival]:
    """The trace's first seconds, from its beginning again whenever it ends."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    round_ms = rows[-1]["arrival_ms"] + 250
    found: list[Arrival] = []
    while True:
        number, index = divmod(len(found), len(rows))
        row = rows[index]
        at_s = (number * round_ms + row["arrival_ms"]) / 1e3 / scale.pace
        if at_s >= seconds:
            return found
        prompt = min(max(row["context_tokens"] // scale.prompt_divisor, 2), scale.longest_prompt)
        found.append(
            Arrival(at_s, prompt, min(max(row["generated_tokens"] // scale.completion_divisor, 2), scale.longest_completion))
        )


def choose_kind(chance: random.Random) -> str:
    return chance.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]


@dataclass
class Client:
    """Sends requests through one channel at a time, and keeps a record of each."""

    channel: grpc.aio.Channel
    records: list[Record] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def num_ended(self) -> int:
        return len(self.records) - len(self.running)

    async def replay(self, plan: Sequence[tuple[float, Callable[[], Asked]]], stopped: Callable[[], bool] = lambda: False) -> None:
        """Open loop: each request leaves at its time, however the earlier ones fare. Returns when all have left, or `stopped`."""
        start = time.monotonic()
        for at_s, make in plan:
            await asyncio.sleep(max(0.0, start + at_s - time.monotonic()))
            if stopped():
                return
            self.send(make())

    def send(self, asked: Asked) -> Record:
        """Starts a request; its record fills as the answer comes."""
        record = blank(asked)
        self.records.append(record)
        task = asyncio.create_task(converse(self.channel, asked, record))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return record

    async def finish(self, limit_s: float) -> None:
        """Waits until all requests have ended; those that have not by then keep no code."""
        if self.running:
            await asyncio.wait(self.running, timeout=limit_s)
        for task in self.running:
            task.cancel()


def blank(asked: Asked) -> Record:
    """The record of a request that has not begun."""
    return Record(asked.number, asked.kind, len(asked.request.token_ids.ids), asked.deadline_s, asked.expected)


async def converse(channel: grpc.aio.Channel, asked: Asked, record: Record) -> None:
    """One request, from its first byte to its status."""
    stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    record.began = latest = time.monotonic()
    call = stub.Generate(asked.request, timeout=asked.deadline_s)
    try:
        if asked.cancel_after == 0:
            call.cancel()
        async for response in call:
            now = time.monotonic()
            record.longest_gap_s, latest = max(record.longest_gap_s, now - latest), now
            note(record, response)
            if asked.cancel_after is not None and len(record.tokens) >= asked.cancel_after:
                call.cancel()
        code = await call.code()
        record.ended, record.code = time.monotonic(), code.name
    except grpc.aio.AioRpcError as error:
        failure = from_rpc_error(error)
        record.ended, record.code = time.monotonic(), error.code().name
        record.reason, record.message = failure.reason.value, failure.message
        record.has_retry_info = failure.retry_after_s is not None
    except asyncio.CancelledError:
        if asked.cancel_after is None:  # the run is over, and this request is not
            raise
        record.ended, record.code = time.monotonic(), "CANCELLED"


def note(record: Record, response: generation_pb2.GenerateResponse) -> None:
    """Writes one event down."""
    if record.num_endings:
        record.num_events_after_the_end += 1
    if response.HasField("finished"):
        finished = response.finished
        record.num_endings += 1
        record.finish = generation_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
        record.usage = (finished.usage.prompt_tokens, finished.usage.completion_tokens)
        return
    delta = response.delta
    if delta.index != len(record.tokens):
        record.wrong_indexes.append((delta.index, len(record.tokens)))
    record.tokens += delta.token_ids
    record.text += delta.text
    record.num_logprobs += len(delta.logprobs)
    leads = [each.top[0].logprob - each.top[1].logprob for each in delta.logprobs if len(each.top) > 1]
    record.smallest_lead = min([record.smallest_lead, *leads])

"""The clients: each request is made, read, cancelled and remembered as its wish says."""

import asyncio
from dataclasses import dataclass, field

import grpc
import grpc.aio

from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.channels import open_channel
from tests.simulation.expected import Expected, expected
from tests.simulation.process import Process
from tests.simulation.scenario import Wish
from tests.simulation.world import PORT, World


@dataclass
class Record:
    """What became of a wish. `ends` counts how often it ended, which must be once."""

    wish: Wish
    expected: Expected
    started_at: float = 0.0
    first_token_at: float | None = None
    ended_at: float = 0.0
    ends: int = 0
    code: grpc.StatusCode | None = None
    details: str = ""
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: generation_pb2.Finished | None = None


class Clients:
    """Processes that make requests, and check whatever comes back as it comes (I1, I2)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loop = world.loop
        self._processes: dict[str, Process] = {}

    async def ask(self, wish: Wish) -> Record:
        """Returns once the request has ended at its client."""
        record = Record(wish, expected(wish))
        if wish.client not in self._processes:
            self._processes[wish.client] = self._loop.process(wish.client)
        await self._processes[wish.client].spawn(self._request(record))
        return record

    async def _request(self, record: Record) -> None:
        wish = record.wish
        await asyncio.sleep(wish.starts_at)
        record.started_at = self._loop.time()
        async with open_channel(f"gateway:{PORT}") as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request_of(wish), timeout=wish.timeout_s)
            if wish.cancel_after_events is not None:
                client = self._loop.current
                self._loop.before_event(
                    self._loop.num_events + wish.cancel_after_events, lambda: client.run(self._cancel, record, call)
                )
            try:
                async for response in call:
                    self._take(record, response)
                    if wish.read_pause_s:
                        await asyncio.sleep(wish.read_pause_s)
                self._end(record, grpc.StatusCode.OK, "")
            except grpc.aio.AioRpcError as error:
                self._end(record, error.code(), error.details() or "")
            except asyncio.CancelledError:
                self._end(record, grpc.StatusCode.CANCELLED, "")

    def _cancel(self, record: Record, call: grpc.aio.UnaryStreamCall) -> None:
        if call.cancel():
            record.cancelled = True
            self._world.injected["client cancel"] += 1
            self._world.note(f"request {record.wish.number} cancelled by its client")

    def _take(self, record: Record, response: generation_pb2.GenerateResponse) -> None:
        wish, violated = record.wish, self._world.violated
        if record.finished is not None:
            violated(f"I1: request {wish.number} went on after its end")
        if response.HasField("finished"):
            record.finished = response.finished
            return
        if record.first_token_at is None:
            record.first_token_at = self._loop.time()
        delta = response.delta
        if delta.index != len(record.tokens):
            violated(f"I2: request {wish.number} got token {delta.index} where {len(record.tokens)} was due")
        record.tokens += delta.token_ids
        record.text += delta.text
        if wish.logprobs and [round(each.logprob * -64) for each in delta.logprobs] != list(delta.token_ids):
            violated(f"I2: request {wish.number} got log-probabilities of other tokens")
        if not record.expected.begins(record.tokens, record.text):
            violated(f"I2: request {wish.number} got {record.tokens}, undisturbed it is {record.expected.tokens}")

    def _end(self, record: Record, code: grpc.StatusCode, details: str) -> None:
        record.ends += 1
        record.code, record.details, record.ended_at = code, details, self._loop.time()
        self._world.note(f"request {record.wish.number} ended with {code.name} after {len(record.tokens)} tokens {details}")


def request_of(wish: Wish) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=wish.prompt),
        sampling=generation_pb2.SamplingParams(seed=wish.number + 7),
        stopping=generation_pb2.StoppingParams(
            max_tokens=wish.max_tokens, min_tokens=wish.min_tokens, ignore_eos=wish.ignore_eos, stop=wish.stop
        ),
        output=generation_pb2.OutputOptions(logprobs=0) if wish.logprobs else None,
    )

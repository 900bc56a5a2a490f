"""Prefill and decode workers without a model: real gRPC servers in this process that keep the contracts.

Token i of a completion is a function of prompt and i. Gates hold a request at a phase, and faults break it there. Everything that a
worker holds for a request is counted, so that tests can see it freed.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import grpc
import grpc.aio

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason, TandemError
from tandem.interceptor import Interceptor
from tandem.server import server_options
from tandem.status import StatusServicer, WorkerIdentity, WorkerSnapshot
from tandem.worker.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_pb2,
    kv_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    status_pb2_grpc,
)
from tests.fakes.gates import Book, Gates

BLOCK_TOKENS = 16
LAYOUT = kv_pb2.KvLayout(
    num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=BLOCK_TOKENS, dtype=kv_pb2.KV_DTYPE_FLOAT32, tensor_parallel_size=1
)

TokenFunction = Callable[[Sequence[int], int], int]


def letters(prompt: Sequence[int], index: int) -> int:
    """A letter of the byte-level vocabulary of random models."""
    digest = hashlib.blake2b(f"{list(prompt)}:{index}".encode(), digest_size=4).digest()
    return 3 + ord("a") + int.from_bytes(digest, "big") % 26


def spelling(text: str, then: int = 2) -> TokenFunction:
    """Spells a text byte by byte, then draws `then` (2 is the end token)."""
    content = text.encode()
    return lambda prompt, index: 3 + content[index] if index < len(content) else then


@dataclass
class Ticket:
    """What a fake prefill worker keeps for decode; `fate` is None while the ticket lives."""

    message: kv_pb2.KvTicket
    finished: "asyncio.Future[int]"
    fate: str | None = None


class FakeWorker:
    """The gRPC server and status of a fake worker. Use as an async context manager; `kill` ends it as a crash would."""

    role: operations_pb2.WorkerRole

    def __init__(self, model_digest: str, token: TokenFunction = letters, layout: kv_pb2.KvLayout = LAYOUT) -> None:
        self.gates = Gates()
        self.book = Book()
        self.token = token
        self.worker_id = str(uuid.uuid4())
        self.model_digest = model_digest
        self.layout = layout
        self.address = ""
        self.alive = True
        self.traceparents: list[str] = []
        self.snapshot = WorkerSnapshot(
            role=self.role,
            condition=operations_pb2.WORKER_CONDITION_SERVING,
            queued_requests=0,
            queued_tokens=0,
            running_requests=0,
            max_requests=64,
            total_blocks=1000,
            free_blocks=1000,
            tokens_per_second=1000.0,
        )
        self.interceptor = Interceptor()
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._status = StatusServicer(
            self._identity(), lambda: self.snapshot, minimum_interval_s=0.001, maximum_interval_s=0.3, sleep=self._breathe
        )
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> "FakeWorker":
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.kill()

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(interceptors=[self.interceptor], options=server_options(1000))
        status_pb2_grpc.add_WorkerStatusServiceServicer_to_server(self._status, self._server)
        self._add_services(self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def kill(self) -> None:
        self.alive = False
        if self._server is not None:
            await self._server.stop(None)

    def become_another(self) -> None:
        """As if another process had taken its place, unnoticed."""
        self.worker_id = str(uuid.uuid4())
        self._status._identity = self._identity()
        self._status.changed()

    def say(self, **changes: object) -> None:
        """Changes the status and tells all watchers."""
        self.snapshot = replace(self.snapshot, **changes)  # type: ignore[arg-type]
        self._status.changed()

    def fall_silent(self) -> None:
        """Says nothing more of itself, as if it were frozen; what it streams is up to its gates."""
        self._speaking.clear()

    def speak_again(self) -> None:
        self._speaking.set()

    async def _breathe(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._speaking.wait()

    def _add_services(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def _identity(self) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=self.worker_id,
            role=self.role,
            model_digest=self.model_digest,
            tokenizer_digest="tokenizer",
            layout=self.layout,
            device="fake",
            weight_format="none",
            transports=("tcp",),
        )

    def _note_trace(self, context: grpc.aio.ServicerContext) -> None:
        self.traceparents += [str(value) for key, value in context.invocation_metadata() or () if key == "traceparent"]

    def _draw(
        self, token_ids: Sequence[int], index: int, rule: prefill_pb2.StopRule, logprobs: int | None
    ) -> prefill_pb2.SampledToken:
        token_id = self.token(token_ids, index)
        if index < rule.min_tokens and token_id in rule.end_token_ids:
            token_id = 3 + ord("-")
        return sampled(token_id, logprobs)


def sampled(token_id: int, logprobs: int | None) -> prefill_pb2.SampledToken:
    """A token with made-up log-probabilities: -0.5 for itself, then -1, -2 for its neighbours."""
    if logprobs is None:
        return prefill_pb2.SampledToken(token_id=token_id)
    others = [
        prefill_pb2.TokenProbability(token_id=(token_id + rank) % 512, logprob=-float(rank) or -0.5) for rank in range(logprobs)
    ]
    return prefill_pb2.SampledToken(token_id=token_id, logprob=-0.5, top=others)


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer, kv_pb2_grpc.KvTransferServiceServicer):
    """Phases: "queue" before anything, "admit" before the ticket is sent, "run" before the first token is drawn, "first" before it
    is sent, "done" before the end."""

    role = operations_pb2.WORKER_ROLE_PREFILL
    by_address: ClassVar[dict[str, "FakePrefill"]] = {}
    """Those that live."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.tickets: dict[str, Ticket] = {}
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.cached_tokens = 0
        self.queue_us = 0

    async def start(self, port: int = 0) -> None:
        await super().start(port)
        self.by_address[self.address] = self

    async def kill(self) -> None:
        self.by_address.pop(self.address, None)
        await super().kill()

    @property
    def live_tickets(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets.values() if ticket.fate is None]

    def _add_services(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)
        kv_pb2_grpc.add_KvTransferServiceServicer_to_server(self, server)

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        self.requests.append(request)
        self._note_trace(context)
        with self.book.entry(request.request_id):
            if request.attempt > 1:
                yield prefill_pb2.PrefillResponse(taken=prefill_pb2.Taken())
            await self.gates.passage("queue")
            ticket = None if request.first_token_only else self._grant(request)
            try:
                async for response in self._events(request, ticket):
                    yield response
            finally:
                if ticket is not None and not ticket.finished.done():
                    ticket.fate = ticket.fate or "aborted"
                    ticket.finished.cancel()

    async def _events(
        self, request: prefill_pb2.PrefillRequest, ticket: Ticket | None
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        await self.gates.passage("admit")
        message = None if ticket is None else ticket.message
        admitted = prefill_pb2.Admitted(ticket=message, cached_tokens=self.cached_tokens)
        yield prefill_pb2.PrefillResponse(admitted=admitted)
        await self.gates.passage("run")
        first = self._first_token(request)
        if ticket is not None:
            ticket.finished.set_result(first.token.token_id)
        await self.gates.passage("first")
        yield prefill_pb2.PrefillResponse(first_token=first)
        await self.gates.passage("done")
        yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone(queue_us=self.queue_us, run_us=1))

    def _first_token(self, request: prefill_pb2.PrefillRequest) -> prefill_pb2.FirstToken:
        prompt, done = split_prompt(request)
        token = self._draw(prompt, done, request.stop_rule, _count(request, "logprobs"))
        wanted = _count(request, "prompt_logprobs")
        rest = [] if wanted is None else [sampled(token_id, wanted) for token_id in prompt[1:]]
        return prefill_pb2.FirstToken(token=token, prompt_logprobs=rest)

    def _grant(self, request: prefill_pb2.PrefillRequest) -> Ticket:
        num_tokens = len(request.token_ids)
        message = kv_pb2.KvTicket(
            ticket_id=uuid.uuid4().hex,
            epoch=request.attempt,
            producer_id=self.worker_id,
            model_digest=self.model_digest,
            tokenizer_digest="tokenizer",
            layout=self.layout,
            num_tokens=num_tokens,
            block_ids=range(-(-num_tokens // BLOCK_TOKENS)),
            lease_ms=5000,
            address=self.address,
        )
        ticket = Ticket(message, asyncio.get_running_loop().create_future())
        self.tickets[message.ticket_id] = ticket
        return ticket

    async def first_token_of(self, ticket_id: str) -> int:
        """What a decode worker learns once all blocks have come: they travel by no gRPC call."""
        ticket = self.tickets.get(ticket_id)
        if ticket is None or ticket.fate is not None:
            raise TandemError(Reason.TICKET_NOT_FOUND, "no such ticket")
        try:
            return await asyncio.shield(ticket.finished)
        except asyncio.CancelledError:
            if not ticket.finished.cancelled():
                raise
            raise TandemError(Reason.TRANSFER_INTERRUPTED, "the producer gave the ticket up") from None

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseResponse:
        ticket = self.tickets.get(request.ticket_id)
        if ticket is not None:
            ticket.fate = ticket.fate or "released"
        return kv_pb2.ReleaseResponse()


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    """Phases: "reserve" before anything, "pull" before pulling, "run" before the tokens, "token N" before token number N, "end";
    for a Follow call "follow" before anything, "followed" before each delta."""

    role = operations_pb2.WORKER_ROLE_DECODE

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.requests: list[decode_pb2.DecodeRequest] = []
        self.queue_us = 0
        self.tokens_per_delta = 1
        self.skipped_index: int | None = None
        self.skips = False
        self.pull_fault: Callable[[kv_pb2.KvTicket], bool] = lambda ticket: False
        self.followers: dict[str, asyncio.Queue[decode_pb2.StreamDelta]] = {}
        self.sends_plain_tokens = True

    def _add_services(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        self.requests.append(request)
        self._note_trace(context)
        with self.book.entry(request.request_id):
            await self.gates.passage("reserve")
            yield decode_pb2.DecodeResponse(reserved=decode_pb2.Reserved())
            await self.gates.passage("pull")
            first_token_id = await self._pull(request.ticket)
            ready = decode_pb2.KvReady(transport=generation_pb2.TRANSPORT_TCP, pulled_bytes=1000, pull_us=10)
            yield decode_pb2.DecodeResponse(kv_ready=ready)
            await self.gates.passage("run")
            followed = self.followers.get(request.follower_id)
            async for response in self._tokens(request, first_token_id):
                if followed is None or not response.HasField("delta"):
                    yield response
                else:
                    followed.put_nowait(decode_pb2.StreamDelta(stream_number=request.stream_number, delta=response.delta))
                    await followed.join()

    async def Follow(
        self, request: decode_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FollowResponse]:
        await self.gates.passage("follow")
        deltas = self.followers[request.follower_id] = asyncio.Queue()
        try:
            yield decode_pb2.FollowResponse()
            while True:
                delta = await deltas.get()
                await self.gates.passage("followed")
                plain = self.sends_plain_tokens and request.plain_tokens
                yield _as_plain(delta) if plain and _is_plain(delta) else decode_pb2.FollowResponse(deltas=[delta])
                deltas.task_done()
        finally:
            del self.followers[request.follower_id]

    async def _pull(self, ticket: kv_pb2.KvTicket) -> int:
        if self.pull_fault(ticket):
            raise TandemError(Reason.TRANSFER_INTERRUPTED, "the link is cut")
        producer = FakePrefill.by_address.get(ticket.address)
        if producer is None:
            raise TandemError(Reason.TRANSFER_INTERRUPTED, "the producer is gone")
        first_token_id = await producer.first_token_of(ticket.ticket_id)
        async with grpc.aio.insecure_channel(ticket.address) as channel:
            stub = kv_pb2_grpc.KvTransferServiceStub(channel)
            await stub.Release(kv_pb2.ReleaseRequest(ticket_id=ticket.ticket_id, epoch=ticket.epoch))
        return first_token_id

    async def _tokens(self, request: decode_pb2.DecodeRequest, token_id: int) -> AsyncIterator[decode_pb2.DecodeResponse]:
        prompt, done = split_prompt(request)
        rule, wanted, index = request.stop_rule, _count(request, "logprobs"), done + 1
        group: list[prefill_pb2.SampledToken] = []
        while token_id not in rule.end_token_ids and index < rule.max_tokens:
            await self.gates.passage(f"token {index}")
            group.append(self._draw(prompt, index, rule, wanted))
            token_id, index = group[-1].token_id, index + 1
            if len(group) == self.tokens_per_delta or token_id in rule.end_token_ids or index == rule.max_tokens:
                yield self._delta(index - len(group), group)
                group = []
        await self.gates.passage("end")
        stopped = token_id in rule.end_token_ids
        reason = generation_pb2.FINISH_REASON_STOP if stopped else generation_pb2.FINISH_REASON_LENGTH
        finished = decode_pb2.DecodeFinished(reason=reason, queue_us=self.queue_us, run_us=1, num_tokens=index)
        yield decode_pb2.DecodeResponse(finished=finished)

    def _delta(self, index: int, tokens: Sequence[prefill_pb2.SampledToken]) -> decode_pb2.DecodeResponse:
        if self.skips or index == self.skipped_index:
            index += 1
        return decode_pb2.DecodeResponse(delta=decode_pb2.TokenDelta(index=index, tokens=tokens))


def _is_plain(delta: decode_pb2.StreamDelta) -> bool:
    return not any(token.HasField("logprob") for token in delta.delta.tokens)


def _as_plain(delta: decode_pb2.StreamDelta) -> decode_pb2.FollowResponse:
    tokens, first = delta.delta.tokens, delta.delta.index
    return decode_pb2.FollowResponse(
        plain_tokens=decode_pb2.PlainTokens(
            stream_numbers=[delta.stream_number] * len(tokens),
            indexes=range(first, first + len(tokens)),
            token_ids=[token.token_id for token in tokens],
        )
    )


def split_prompt(request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest) -> tuple[list[int], int]:
    """The user's prompt, and how many tokens of the completion there already were."""
    return list(request.token_ids[: request.num_prompt_tokens]), len(request.token_ids) - request.num_prompt_tokens


def _count(request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest, name: str) -> int | None:
    return getattr(request, name) if request.HasField(name) else None

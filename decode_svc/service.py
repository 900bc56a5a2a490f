"""DecodeService: one coroutine per request between the gateway, the puller and the engine."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import context as otel_context

from decode_svc.batcher import SequenceState
from decode_svc.engine import DecodeEngine
from decode_svc.follower import FollowedStream, Follower, News
from decode_svc.job import DecodeEvent, DecodeJob, Drawn, Ended, EndReason, Failed, StopRule
from kvtransfer.puller import KvPuller, PullResult
from kvtransfer.ticket import KvTicket
from kvtransfer.wire import TRANSPORT_NUMBERS, ticket_from_proto
from llm.kv.copying import Event
from llm.sampling_params import SamplingParams
from tandem.api.v1 import generation_pb2
from tandem.attempts import Attempts
from tandem.clock import wall_ns
from tandem.errors import Reason, TandemError, invalid_field
from tandem.sampled import sampled_to_proto, sampling_values
from tandem.tracing import record_span
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc
from tandem.worker_requests import ModelLimits, check_request, deadline_of

_FINISH_REASONS = {
    EndReason.STOP: generation_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves `Decode`. `draining` turned on refuses new requests and lets the present ones finish."""

    def __init__(self, engine: DecodeEngine, puller: KvPuller, limits: ModelLimits) -> None:
        self._engine = engine
        self._puller = puller
        self._limits = limits
        self._attempts = Attempts()
        self._followers: dict[str, Follower] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self.draining = False

    async def Decode(self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        if self.draining:
            raise TandemError(Reason.DRAINING, "this decode worker is shutting down")
        check_request(request, self._limits)
        ticket = ticket_from_proto(request.ticket)
        check_ticket(request, ticket)
        self._puller.check(ticket)
        job = job_from(request, deadline_of(context.time_remaining(), self._engine.clock()))
        follower = self._followers.get(request.follower_id)
        if follower is not None:
            job.outlet = FollowedStream(follower, request.stream_number, job.mailbox)
        with self._attempts.entered(request.request_id, request.attempt):
            block_ids = self._engine.reserve(job)
            try:
                run = _DecodeRun(request, context, job)
                result = await self._pull(run, ticket, block_ids, _Arrival(self._engine, job, self._limits.vocabulary_size))
                self._engine.activate(job, result.first_token_id)
                await run.serve(result)
            finally:
                self._engine.close(job)

    async def Follow(
        self, request: decode_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FollowResponse]:
        if not request.follower_id or request.follower_id in self._followers:
            raise invalid_field("follower_id", "must be given, and be another for each call")
        follower = self._followers[request.follower_id] = Follower(reads_plain_tokens=request.plain_tokens)
        try:
            yield decode_pb2.FollowResponse()
            while True:
                yield _news_to_proto(await follower.take())
        finally:
            follower.gone = True
            del self._followers[request.follower_id]

    async def wait_idle(self) -> None:
        """Returns once no request is here."""
        await self._attempts.wait_idle()

    async def close(self) -> None:
        """Waits for releases under way."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _pull(self, run: "_DecodeRun", ticket: KvTicket, block_ids: Sequence[int], arrival: "_Arrival") -> PullResult:
        """Whoever cancels this has no more use for the ticket either. After an error the producer or the lease ends it."""
        try:
            await run.write(reserved=decode_pb2.Reserved())
            run.pull_began_ns = time.monotonic_ns()
            result = await self._puller.pull(ticket, block_ids[: len(ticket.block_ids)], arrival)
        except TandemError:
            raise
        except MemoryError as error:
            raise TandemError(Reason.KV_BLOCKS_EXHAUSTED, "there is no memory to take the blocks in with") from error
        except BaseException:
            self._release_soon(ticket)
            raise
        self._release_soon(ticket)
        if result.first_token_id >= self._limits.vocabulary_size:
            raise TandemError(Reason.INTERNAL, f"the prefill worker's first token, {result.first_token_id}, does not exist")
        return result

    def _release_soon(self, ticket: KvTicket) -> None:
        """Off the critical path; a release that gets lost is made up for by the lease."""
        task = asyncio.create_task(_forgiving(self._puller.release(ticket)))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


@dataclass(frozen=True)
class _Arrival:
    """What the puller says of a job's blocks, for the engine."""

    engine: DecodeEngine
    job: DecodeJob
    vocabulary_size: int

    def coming(self, first_token_id: int, after: Sequence[Event]) -> None:
        if first_token_id < self.vocabulary_size:
            self.engine.expect(self.job, first_token_id, after)

    def withdrawn(self) -> None:
        self.engine.withdraw(self.job)


class _DecodeRun:
    """One request from the moment its blocks are reserved: messages, times and spans."""

    def __init__(self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext, job: DecodeJob) -> None:
        self._request = request
        self._context = context
        self._job = job
        self.pull_began_ns = 0

    async def write(self, **event: Any) -> None:
        await self._context.write(decode_pb2.DecodeResponse(**event))

    async def serve(self, pulled: PullResult) -> None:
        self._trace_pull(pulled)
        await self.write(
            kv_ready=decode_pb2.KvReady(
                transport=TRANSPORT_NUMBERS[pulled.transport],
                pulled_bytes=pulled.num_bytes,
                pull_us=pulled.pull_us,
                refetched_blocks=pulled.num_refetched,
            )
        )
        while not await self._forward(await self._job.mailbox.take()):
            pass

    async def _forward(self, events: Sequence[DecodeEvent]) -> bool:
        """Sends what the engine said, neighbouring tokens in one message; True after the last message. Followed tokens do not come
        here."""
        for drawn, group in itertools.groupby(events, lambda event: isinstance(event, Drawn)):
            if drawn:
                await self.write(delta=_delta([event for event in group if isinstance(event, Drawn)]))
                continue
            for event in group:
                match event:
                    case Ended(reason):
                        await self._finish(reason)
                        return True
                    case Failed(error):
                        raise error
        return False

    async def _finish(self, reason: EndReason) -> None:
        job = self._job
        started_ns = max(job.started_ns or job.ended_ns, job.ready_ns)  # a step of it may have begun before it was ready
        self._trace_run(started_ns)
        await self.write(
            finished=decode_pb2.DecodeFinished(
                reason=_FINISH_REASONS[reason],
                queue_us=(started_ns - job.ready_ns) // 1000,
                run_us=(job.ended_ns - started_ns) // 1000,
                num_preemptions=job.sequence.num_preemptions,
                num_tokens=job.num_completion_tokens,
            )
        )

    def _trace_pull(self, pulled: PullResult) -> None:
        parent, job = otel_context.get_current(), self._job
        first_frame_ns = max(self.pull_began_ns, job.ready_ns - pulled.pull_us * 1000)
        record_span("kv.wait", parent, wall_ns(self.pull_began_ns), wall_ns(first_frame_ns), {})
        attributes: dict[str, str | int] = {
            "tandem.kv.transport": pulled.transport,
            "tandem.kv.bytes": pulled.num_bytes,
            "tandem.kv.refetched_blocks": pulled.num_refetched,
        }
        record_span("kv.pull", parent, wall_ns(first_frame_ns), wall_ns(job.ready_ns), attributes)

    def _trace_run(self, started_ns: int) -> None:
        parent, job = otel_context.get_current(), self._job
        record_span("decode.queue", parent, wall_ns(job.ready_ns), wall_ns(started_ns), {})
        attributes: dict[str, str | int] = {
            "tandem.request_id": self._request.request_id,
            "gen_ai.usage.output_tokens": job.num_completion_tokens,
            "tandem.decode.preemptions": job.sequence.num_preemptions,
        }
        record_span("decode.run", parent, wall_ns(started_ns), wall_ns(job.ended_ns), attributes)


def _delta(drawn: Sequence[Drawn]) -> decode_pb2.TokenDelta:
    return decode_pb2.TokenDelta(index=drawn[0].index, tokens=[sampled_to_proto(event.token) for event in drawn])


def _news_to_proto(news: News) -> decode_pb2.FollowResponse:
    plain = None
    if news.token_ids:
        columns = {"stream_numbers": news.stream_numbers, "indexes": news.indexes, "token_ids": news.token_ids}
        plain = decode_pb2.PlainTokens(**columns)
    deltas = [decode_pb2.StreamDelta(stream_number=number, delta=_delta([drawn])) for number, drawn in news.rich]
    return decode_pb2.FollowResponse(deltas=deltas, plain_tokens=plain)


async def _forgiving(release: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(TandemError, grpc.aio.AioRpcError):  # the lease ends by itself
        await release


def check_ticket(request: decode_pb2.DecodeRequest, ticket: KvTicket) -> None:
    """Raises INVALID_REQUEST where the ticket is for another request."""
    if ticket.num_tokens != len(request.token_ids):
        raise TandemError(Reason.INVALID_REQUEST, f"the ticket is for {ticket.num_tokens} tokens, not {len(request.token_ids)}")
    if request.attempt != ticket.epoch:
        raise TandemError(Reason.INVALID_REQUEST, f"attempt {request.attempt} brings a ticket of epoch {ticket.epoch}")


def job_from(request: decode_pb2.DecodeRequest, deadline: float) -> DecodeJob:
    """The engine's view of a request; `deadline` is on the engine's clock."""
    rule = request.stop_rule
    return DecodeJob(
        sequence=SequenceState(list(request.token_ids), request.num_prompt_tokens + rule.max_tokens, deadline=deadline),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=SamplingParams(**sampling_values(request.sampling)),
        stop_rule=StopRule(frozenset(rule.end_token_ids), rule.min_tokens, rule.max_tokens),
        num_logprobs=request.logprobs if request.HasField("logprobs") else None,
    )

"""GenerationService: one coroutine per request, from the client's message to its last event."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
import grpc.aio
from opentelemetry.trace import Span

from gateway.admission import Admission, Size
from gateway.calls import cancel_and_wait
from gateway.completion import Completion
from gateway.job import Ending, GenerationJob
from gateway.pending import PendingOutput
from gateway.prompts import prompt_tokens
from gateway.relay import Relay, user_error
from gateway.request_id import new_request_id
from gateway.running_keys import RunningKeys
from gateway.served_model import ServedModel
from gateway.spans import note_ending, note_job, note_request, record_tokenizing, request_span
from gateway.stall import watching
from gateway.timeline import Timeline
from gateway.validate import check_length, check_request
from gateway.wire import ResponseWriter
from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.errors import Reason, TandemError
from tandem.interceptor import when_dismissed


@dataclass(frozen=True)
class RequestLimits:
    """Seconds: the longest deadline, also that of a request without one, and how long one write to a client may take."""

    max_deadline_s: float
    stall_limit_s: float


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves `Generate`. `draining` turned on refuses new requests and lets the present ones finish."""

    def __init__(
        self, model: ServedModel, admission: Admission, relay: Relay, limits: RequestLimits, clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._admission = admission
        self._relay = relay
        self._limits = limits
        self._clock = clock
        self._running_keys = RunningKeys()
        self.draining = False

    async def Generate(self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """The stream is written here, so that a stalled client is noticed. Raises the error table's answers."""
        timeline = Timeline(self._clock)
        if self.draining:
            raise TandemError(Reason.DRAINING, "the gateway is shutting down")
        remaining_s = self._deadline_s(context)
        request_id = new_request_id()
        try:
            async with asyncio.timeout(remaining_s):
                with self._running_keys.held(request.idempotency_key), request_span(request_id, self._model) as span:
                    job = await self._prepare(request, request_id, self._clock() + remaining_s, span)
                    timeline.tokenized()
                    await self._run(job, timeline, context, span)
        except TimeoutError:
            raise TandemError(Reason.DEADLINE_EXCEEDED, f"not done within {remaining_s:.3g} s") from None

    def _deadline_s(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        most = self._limits.max_deadline_s
        return most if remaining is None else min(remaining, most)

    async def _prepare(
        self, request: generation_pb2.GenerateRequest, request_id: str, deadline: float, span: Span
    ) -> GenerationJob:
        """The request, checked and tokenized; refused before the costly part if the gateway is full anyway."""
        began, token_ids = self._clock(), None
        try:
            checked = check_request(request, self._model)
            note_request(span, checked, self._model)
            self._admission.check()
            token_ids = await prompt_tokens(checked.prompt, self._model)
            stopping = check_length(len(token_ids), checked, self._model, self._relay.pool_tokens(self._model.digest))
        finally:
            record_tokenizing(began, self._clock(), None if token_ids is None else len(token_ids))
        seed = secrets.randbits(64) if checked.seed is None else checked.seed
        job = GenerationJob(
            request_id=request_id,
            model_digest=self._model.digest,
            token_ids=token_ids,
            sampling=replace(checked.sampling, seed=seed),
            stopping=stopping,
            output=checked.output,
            deadline=deadline,
        )
        note_job(span, job)
        return job

    async def _run(self, job: GenerationJob, timeline: Timeline, context: grpc.aio.ServicerContext, span: Span) -> None:
        self._relay.check(job)
        self._relay.check_deadline(job)
        async with self._admission.place(Size(len(job.token_ids), job.stopping.max_tokens), job.deadline) as prefilled:
            await self._stream(job, timeline, context, span, prefilled)

    async def _stream(
        self, job: GenerationJob, timeline: Timeline, context: grpc.aio.ServicerContext, span: Span, prefilled: Callable[[], None]
    ) -> None:
        pending = PendingOutput()
        completion = Completion(job, self._model.tokenizer, pending)
        relaying = asyncio.create_task(self._relay.run(job, completion, timeline))
        relaying.add_done_callback(lambda task: _hand_over(task, pending))
        writer = ResponseWriter(job, self._model.tokenizer)
        when_dismissed(lambda: user_error(TandemError(Reason.DRAINING, "the gateway is shutting down"), writer.num_tokens))
        try:
            ending = await self._write_all(pending, writer, context, prefilled)
            note_ending(span, ending)
            self._admission.completed(ending.num_completion_tokens)
        finally:
            await cancel_and_wait(relaying)

    async def _write_all(
        self, pending: PendingOutput, writer: ResponseWriter, context: grpc.aio.ServicerContext, prefilled: Callable[[], None]
    ) -> Ending:
        """Calls `prefilled` as soon as there is a token. Raises SLOW_READER."""
        async with watching(self._limits.stall_limit_s) as watch:
            while True:
                event = await pending.take()
                prefilled()
                response = writer.response(event)
                watch.writing()
                await context.write(response)
                watch.written()
                if isinstance(event, Ending):
                    return event


def _hand_over(task: "asyncio.Task[Ending]", pending: PendingOutput) -> None:
    """A relay's result is what the writer gets last."""
    if not task.cancelled():
        pending.finish(task.exception() or task.result())

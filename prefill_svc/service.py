"""PrefillService: one coroutine per request between the gateway, the engine and the ticket ledger."""

import time
from collections.abc import Sequence

import grpc
from opentelemetry import context as otel_context

from kvtransfer.producer import KvProducer
from kvtransfer.ticket import KvTicket
from kvtransfer.wire import ticket_to_proto
from llm.sampling_params import SamplingParams
from prefill_svc.batcher import PromptState
from prefill_svc.engine import PrefillEngine
from prefill_svc.job import Admitted, Failed, Finished, PrefillEvent, PrefillJob, Progress
from tandem.attempts import Attempt, Attempts
from tandem.clock import wall_ns
from tandem.errors import Reason, TandemError
from tandem.sampled import sampled_to_proto, sampling_values
from tandem.tracing import record_span
from tandem.worker.v1 import prefill_pb2, prefill_pb2_grpc
from tandem.worker_requests import ModelLimits, check_request, deadline_of


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves `Prefill`. `draining` turned on refuses new requests and lets the present ones finish."""

    def __init__(self, engine: PrefillEngine, producer: KvProducer, model_digest: str, limits: ModelLimits) -> None:
        self._engine = engine
        self._producer = producer
        self._model_digest = model_digest
        self._limits = limits
        self._attempts = Attempts(producer.is_outstanding)
        self.draining = False

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        self._check(request)
        job = job_from(request, deadline_of(context.time_remaining(), self._engine.clock()))
        with self._attempts.entered(request.request_id, request.attempt) as attempt:
            run = _PrefillRun(request, context, job, self._producer, self._engine, attempt=attempt)
            if request.attempt > 1:
                await context.write(prefill_pb2.PrefillResponse(taken=prefill_pb2.Taken()))
            self._engine.submit(job)
            try:
                await run.serve()
            finally:
                run.close()
                self._engine.close(job)

    async def wait_idle(self) -> None:
        """Returns once no request is here."""
        await self._attempts.wait_idle()

    def _check(self, request: prefill_pb2.PrefillRequest) -> None:
        if self.draining:
            raise TandemError(Reason.DRAINING, "this prefill worker is shutting down")
        if request.model_digest != self._model_digest:
            message = f"this worker serves model {self._model_digest[:12]}, not {request.model_digest[:12]}"
            raise TandemError(Reason.MODEL_MISMATCH, message)
        check_request(request, self._limits)


class _PrefillRun:
    """One request: turns the engine's events into ticket progress and stream messages."""

    def __init__(
        self,
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext,
        job: PrefillJob,
        producer: KvProducer,
        engine: PrefillEngine,
        *,
        attempt: Attempt,
    ) -> None:
        self._request = request
        self._context = context
        self._job = job
        self._producer = producer
        self._engine = engine
        self._attempt = attempt
        self._ticket: KvTicket | None = None
        self._finished = False
        self._arrived_ns = time.monotonic_ns()

    async def serve(self) -> None:
        while not self._finished:
            for event in await self._job.mailbox.take():
                await self._handle(event)
                if self._finished:
                    return  # that the engine failed after that is others' concern

    def close(self) -> None:
        """A ticket whose prompt was not finished is worth nothing to anyone."""
        if self._ticket is not None and not self._finished:
            self._producer.abort(self._ticket.ticket_id, TandemError(Reason.CANCELLED, "the prefill was cancelled"))

    async def _handle(self, event: PrefillEvent) -> None:
        match event:
            case Admitted():
                await self._admit(event)
            case Progress() if self._ticket is not None:
                self._producer.progress(self._ticket.ticket_id, self._num_full_blocks(event.num_computed_tokens))
            case Finished():
                await self._finish(event)
            case Failed(error):
                raise error

    async def _admit(self, event: Admitted) -> None:
        ticket = None
        if not self._request.first_token_only:
            if not self._engine.share(self._job):
                return  # why it has ended comes next
            self._ticket = self._producer.grant(self._request.attempt, self._job.prompt.num_tokens, event.block_ids)
            self._attempt.ticket_id = self._ticket.ticket_id
            self._producer.progress(self._ticket.ticket_id, self._num_full_blocks(event.num_cached_tokens))
            ticket = ticket_to_proto(self._ticket)
        admitted = prefill_pb2.Admitted(ticket=ticket, cached_tokens=event.num_cached_tokens)
        await self._context.write(prefill_pb2.PrefillResponse(admitted=admitted))

    async def _finish(self, event: Finished) -> None:
        """The ticket comes first, so that decode can begin; then the user's first token."""
        if self._ticket is not None:
            self._producer.finish(self._ticket.ticket_id, event.token.token_id)
        self._finished = True
        queue_us, run_us = (event.started_ns - self._arrived_ns) // 1000, (event.finished_ns - event.started_ns) // 1000
        first = prefill_pb2.FirstToken(
            token=sampled_to_proto(event.token),
            prompt_logprobs=[sampled_to_proto(token) for token in event.prompt_logprobs],
            done=prefill_pb2.PrefillDone(queue_us=queue_us, run_us=run_us),
        )
        await self._context.write(prefill_pb2.PrefillResponse(first_token=first))
        self._trace(event)

    def _trace(self, event: Finished) -> None:
        parent = otel_context.get_current()
        prompt = self._job.prompt
        record_span("prefill.queue", parent, wall_ns(self._arrived_ns), wall_ns(event.started_ns), {})
        attributes: dict[str, str | int] = {
            "tandem.request_id": self._request.request_id,
            "gen_ai.usage.input_tokens": prompt.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": prompt.num_cached_tokens,
        }
        record_span("prefill.run", parent, wall_ns(event.started_ns), wall_ns(event.finished_ns), attributes)

    def _num_full_blocks(self, num_tokens: int) -> int:
        """Blocks that will not change any more once `num_tokens` tokens are computed."""
        prompt = self._job.prompt
        return len(prompt.block_ids) if num_tokens == prompt.num_tokens else num_tokens // self._producer.block_tokens


def job_from(request: prefill_pb2.PrefillRequest, deadline: float) -> PrefillJob:
    """The engine's view of a request; `deadline` is on the engine's clock."""
    token_ids: Sequence[int] = list(request.token_ids)
    num_completed = len(token_ids) - request.num_prompt_tokens
    forbidden = list(request.stop_rule.end_token_ids) if num_completed < request.stop_rule.min_tokens else []
    return PrefillJob(
        prompt=PromptState(token_ids, use_prefix_cache=not request.HasField("prompt_logprobs"), deadline=deadline),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=SamplingParams(**sampling_values(request.sampling)),
        forbidden_token_ids=forbidden,
        num_logprobs=request.logprobs if request.HasField("logprobs") else None,
        num_prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
    )

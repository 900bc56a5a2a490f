"""Between the gateway's plain values and the messages of clients and workers."""

from collections.abc import Iterable, Sequence

from gateway.job import Ending, FinishReason, GenerationJob, Output, Sampling, Stopping, Token
from gateway.routing import Condition, Layout, RequestCounts, Role, Worker
from gateway.tokenizer import Tokenizer
from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.worker.v1 import decode_pb2, kv_pb2, prefill_pb2, status_pb2

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def prefill_request(
    job: GenerationJob, attempt: int, token_ids: Sequence[int], first_token_only: bool
) -> prefill_pb2.PrefillRequest:
    """`token_ids` is the prompt, followed by what was generated in earlier attempts, with which the prompt's own were given."""
    resumed = len(token_ids) > len(job.token_ids)
    return prefill_pb2.PrefillRequest(
        request_id=job.request_id,
        attempt=attempt,
        model_digest=job.model_digest,
        token_ids=token_ids,
        num_prompt_tokens=len(job.token_ids),
        sampling=_sampling(job.sampling),
        stop_rule=_stop_rule(job.stopping),
        logprobs=job.output.num_logprobs,
        prompt_logprobs=None if resumed else job.output.num_prompt_logprobs,
        first_token_only=first_token_only,
    )


def decode_request(
    job: GenerationJob, attempt: int, token_ids: Sequence[int], ticket: kv_pb2.KvTicket, follower: tuple[str, int] = ("", 0)
) -> decode_pb2.DecodeRequest:
    """`follower`: the Follow call that is to carry the deltas, and their number there."""
    return decode_pb2.DecodeRequest(
        request_id=job.request_id,
        attempt=attempt,
        ticket=ticket,
        token_ids=token_ids,
        num_prompt_tokens=len(job.token_ids),
        sampling=_sampling(job.sampling),
        stop_rule=_stop_rule(job.stopping),
        logprobs=job.output.num_logprobs,
        follower_id=follower[0],
        stream_number=follower[1],
    )


def tokens_from(messages: Iterable[prefill_pb2.SampledToken]) -> list[Token]:
    return [_token_from(message) for message in messages]


class ResponseWriter:
    """Makes the messages of one client's stream. `num_tokens` are in those made so far."""

    def __init__(self, job: GenerationJob, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self.num_tokens = 0

    def response(self, event: Output | Ending) -> generation_pb2.GenerateResponse:
        request_id = self._job.request_id
        if isinstance(event, Output):
            self.num_tokens += len(event.tokens)
            return generation_pb2.GenerateResponse(request_id=request_id, delta=self._delta(event))
        return generation_pb2.GenerateResponse(request_id=request_id, finished=_finished(event, len(self._job.token_ids)))

    def _delta(self, output: Output) -> generation_pb2.Delta:
        wants_logprobs = self._job.output.num_logprobs is not None
        return generation_pb2.Delta(
            index=output.index,
            text=output.text,
            token_ids=[token.token_id for token in output.tokens],
            logprobs=[self._logprob(token) for token in output.tokens] if wants_logprobs else (),
            prompt=None if output.prompt is None else self._prompt(output.prompt),
        )

    def _prompt(self, logprobs: Sequence[Token]) -> generation_pb2.PromptOutput:
        job = self._job
        return generation_pb2.PromptOutput(
            text=self._tokenizer.decode(job.token_ids, skip_special_tokens=False) if job.output.echo else "",
            token_ids=job.token_ids,
            logprobs=[self._logprob(token) for token in logprobs],
        )

    def _logprob(self, token: Token) -> generation_pb2.TokenLogprob:
        text_of = self._tokenizer.token_text
        return generation_pb2.TokenLogprob(
            token_id=token.token_id,
            token=text_of(token.token_id),
            logprob=token.logprob,
            top=[generation_pb2.TopLogprob(token_id=other, token=text_of(other), logprob=logprob) for other, logprob in token.top],
        )


def _token_from(message: prefill_pb2.SampledToken) -> Token:
    top = tuple((each.token_id, each.logprob) for each in message.top)
    return Token(message.token_id, message.logprob if message.HasField("logprob") else None, top)


def _sampling(sampling: Sampling) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
    )


def _stop_rule(stopping: Stopping) -> prefill_pb2.StopRule:
    return prefill_pb2.StopRule(
        end_token_ids=sorted(stopping.end_token_ids), min_tokens=stopping.min_tokens, max_tokens=stopping.max_tokens
    )


def _finished(ending: Ending, num_prompt_tokens: int) -> generation_pb2.Finished:
    timings = ending.timings
    return generation_pb2.Finished(
        reason=_REASONS[ending.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=num_prompt_tokens,
            cached_prompt_tokens=ending.num_cached_tokens,
            completion_tokens=ending.num_completion_tokens,
        ),
        timings=generation_pb2.Timings(
            tokenize_us=timings.tokenize_us,
            gateway_queue_us=timings.gateway_queue_us,
            prefill_queue_us=timings.prefill_queue_us,
            prefill_us=timings.prefill_us,
            handoff_us=timings.handoff_us,
            decode_queue_us=timings.decode_queue_us,
            decode_us=timings.decode_us,
            handoff_bytes=ending.handoff.num_bytes,
            transport=generation_pb2.Transport.ValueType(ending.handoff.transport),
        ),
    )


_ROLE_NUMBERS = {Role.PREFILL: 1, Role.DECODE: 2}


def worker_from(known: Worker, response: status_pb2.WatchResponse) -> Worker:
    """What a worker says of itself. One of another role than its target's is never ready."""
    same = known.worker_id == response.worker_id
    return Worker(
        address=known.address,
        role=known.role,
        worker_id=response.worker_id,
        ready=response.ready and response.role == _ROLE_NUMBERS[known.role],
        model_digest=response.model_digest,
        tokenizer_digest=response.tokenizer_digest,
        layout=known.layout if same else _layout(response.layout),
        device=response.device,
        weight_format=response.weight_format,
        weight_format_reason=response.weight_format_reason,
        transports=tuple(response.transports),
        total_blocks=response.total_blocks,
        free_blocks=response.free_blocks,
        queued_requests=response.queued_requests,
        queued_tokens=response.queued_tokens,
        running_requests=response.running_requests,
        max_requests=response.max_requests,
        tokens_per_second=response.tokens_per_second,
        condition=Condition(response.condition),
        requests=_counts(response.requests),
    )


def _counts(message: operations_pb2.RequestCounts) -> RequestCounts:
    return RequestCounts(message.received, message.ok, message.cancelled, message.rejected, message.failed)


def _layout(message: kv_pb2.KvLayout) -> Layout:
    return Layout(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
        dtype=message.dtype,
        tensor_parallel_size=message.tensor_parallel_size,
        tensor_parallel_rank=message.tensor_parallel_rank,
    )

"""What a worker demands of the gateway's requests, so that none of them can break an engine that serves others too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.errors import FieldViolation, Reason, TandemError

if TYPE_CHECKING:
    from tandem.api.v1 import generation_pb2
    from tandem.worker.v1 import decode_pb2, prefill_pb2

    WorkerRequest = prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest

MAX_LOGPROBS = 1024
"""Far more than the gateway lets through; keeps one request from filling memory."""

_LARGEST_INT32 = 2**31 - 1
_SMALLEST_POSITIVE = 1e-30
_SAMPLING_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, _LARGEST_INT32),
    "top_p": (_SMALLEST_POSITIVE, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (_SMALLEST_POSITIVE, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, 2**64 - 1),
}

Violations = Iterator[FieldViolation]


@dataclass(frozen=True)
class ModelLimits:
    """What bounds token ids, and the tokens of one sequence."""

    vocabulary_size: int
    context_tokens: int


def check_request(request: WorkerRequest, limits: ModelLimits) -> None:
    """Raises INVALID_REQUEST or INVALID_SAMPLING, naming every bad field. The gateway has refused such requests long before."""
    _refuse(Reason.INVALID_REQUEST, [*_tokens(request, limits), *_stop_rule(request, limits), *_numbers(request)])
    _refuse(Reason.INVALID_SAMPLING, [*_sampling(request.sampling)])


def deadline_of(remaining_s: float | None, now: float) -> float:
    """When a request must have ended that has `remaining_s` seconds left, if it has a limit. DEADLINE_EXCEEDED if that is now."""
    if remaining_s is None:
        return math.inf
    if remaining_s <= 0:
        raise TandemError(Reason.DEADLINE_EXCEEDED, "the deadline had passed before the request could begin")
    return now + remaining_s


def _refuse(reason: Reason, violations: list[FieldViolation]) -> None:
    if violations:
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise TandemError(reason, message, violations=violations)


def _tokens(request: WorkerRequest, limits: ModelLimits) -> Violations:
    num_tokens = len(request.token_ids)
    if not 0 < num_tokens < limits.context_tokens:
        yield FieldViolation("token_ids", f"{num_tokens} tokens are not in [1, {limits.context_tokens})")
    elif max(request.token_ids) >= limits.vocabulary_size:
        yield FieldViolation("token_ids", f"{max(request.token_ids)} is outside of the vocabulary of {limits.vocabulary_size}")
    if not 0 < request.num_prompt_tokens <= num_tokens:
        yield FieldViolation("num_prompt_tokens", f"{request.num_prompt_tokens} is not in [1, {num_tokens}]")


def _stop_rule(request: WorkerRequest, limits: ModelLimits) -> Violations:
    rule, num_completed = request.stop_rule, len(request.token_ids) - request.num_prompt_tokens
    if rule.max_tokens <= num_completed:
        yield FieldViolation("stop_rule.max_tokens", f"{rule.max_tokens} are generated already")
    ends = set(rule.end_token_ids)
    if ends and max(ends) >= limits.vocabulary_size:
        yield FieldViolation("stop_rule.end_token_ids", f"{max(ends)} is outside of the vocabulary of {limits.vocabulary_size}")
    if len(ends) >= limits.vocabulary_size:
        yield FieldViolation("stop_rule.end_token_ids", "leave no token to draw before min_tokens")


def _numbers(request: WorkerRequest) -> Violations:
    if not request.request_id:
        yield FieldViolation("request_id", "must be set")
    if request.attempt < 1:
        yield FieldViolation("attempt", "counts from 1")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(request, name, 0)
        if not 0 <= value <= MAX_LOGPROBS:
            yield FieldViolation(name, f"{value} is not in [0, {MAX_LOGPROBS}]")


def _sampling(sampling: generation_pb2.SamplingParams) -> Violations:
    for name, (low, high) in _SAMPLING_RANGES.items():
        value = getattr(sampling, name)
        if not sampling.HasField(name):
            yield FieldViolation(f"sampling.{name}", "must be set")
        elif not low <= value <= high:  # so is NaN
            yield FieldViolation(f"sampling.{name}", f"{value} is not in [{low:g}, {high:g}]")

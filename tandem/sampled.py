"""Sampling parameters and sampled tokens between the workers' messages and their plain values."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tandem.api.v1 import generation_pb2
from tandem.worker.v1 import prefill_pb2

_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


class SampledTokenLike(Protocol):
    """A token with its log-probability and the likeliest tokens beside it, if they were asked for."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


def sampling_values(message: generation_pb2.SamplingParams) -> Mapping[str, Any]:
    """The fields of a message in which the gateway has set every field."""
    return {name: getattr(message, name) for name in _SAMPLING_FIELDS}


def sampled_to_proto(token: SampledTokenLike) -> prefill_pb2.SampledToken:
    top = [prefill_pb2.TokenProbability(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return prefill_pb2.SampledToken(token_id=token.token_id, logprob=token.logprob, top=top)

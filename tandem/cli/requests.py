"""Command-line options to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.api.v1 import generation_pb2
from tandem.cli.terminal import CommandError


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw tokens and when to end; None leaves the gateway's default."""

    max_tokens: int
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: "system", "user" or "assistant", and what was said."""

    role: str
    content: str


_ROLES = {
    "system": generation_pb2.CHAT_ROLE_SYSTEM,
    "user": generation_pb2.CHAT_ROLE_USER,
    "assistant": generation_pb2.CHAT_ROLE_ASSISTANT,
}


def conversation(turns: Sequence[Turn]) -> generation_pb2.Chat:
    return generation_pb2.Chat(
        messages=[generation_pb2.ChatMessage(role=_ROLES[turn.role], content=turn.content) for turn in turns]
    )


def make_request(
    prompt: str | Sequence[Turn], options: SamplingOptions, logprobs: int | None = None
) -> generation_pb2.GenerateRequest:
    """A request for a text or a conversation. CommandError where a text is not Unicode, which arguments and input need not be."""
    try:
        return _make_request(prompt, options, logprobs)
    except UnicodeEncodeError as error:
        raise CommandError("The text is not valid UTF-8.", "Convert it, for instance with iconv.") from error


def _make_request(prompt: str | Sequence[Turn], options: SamplingOptions, logprobs: int | None) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(
        sampling=generation_pb2.SamplingParams(
            temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed
        ),
        stopping=generation_pb2.StoppingParams(max_tokens=options.max_tokens, stop=options.stop),
        output=generation_pb2.OutputOptions(logprobs=logprobs),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.CopyFrom(conversation(prompt))
    return request

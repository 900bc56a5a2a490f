"""One answer: streamed, timed and summed up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tandem.api.v1 import generation_pb2
from tandem.cli.terminal import CommandError

_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "ended by itself",
    generation_pb2.FINISH_REASON_LENGTH: "cut at the token limit",
}
TRANSPORTS = {value: name.removeprefix("TRANSPORT_").lower() for name, value in generation_pb2.Transport.items() if value}


class Call(Protocol):
    """A running Generate call."""

    def __aiter__(self) -> AsyncIterator[generation_pb2.GenerateResponse]: ...
    def cancel(self) -> bool: ...


@dataclass
class Answer:
    """What has come so far. Times are seconds on the monotonic clock."""

    started: float
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    finished: generation_pb2.Finished | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, delta: generation_pb2.Delta, now: float) -> None:
        if delta.index != self.num_tokens:
            raise CommandError(f"The stream has a gap: token {delta.index} came where {self.num_tokens} was due.")
        if delta.token_ids:
            self.first_token = now if self.first_token is None else self.first_token
            self.last_token = now
        self.num_tokens += len(delta.token_ids)
        self.pieces.append(delta.text)
        self.logprobs.extend(delta.logprobs)


async def stream_answer(call: Call, answer: Answer, on_text: Callable[[str], None]) -> None:
    """Read a call to its end into `answer`; leaving early, for whatever reason, cancels the call."""
    try:
        async for response in call:
            if response.HasField("finished"):
                answer.finished = response.finished
            else:
                answer.add(response.delta, time.monotonic())
                on_text(response.delta.text)
    finally:
        call.cancel()
    if answer.finished is None:
        raise CommandError("The stream ended without its last message.")


def summary(answer: Answer) -> str:
    """One line: time to first token, speed, tokens, hand-off, why it ended."""
    finished = answer.finished
    assert finished is not None, "only finished answers are summed up"
    parts = [*_speeds(answer), _usage(finished.usage), _handoff(finished.timings), _REASONS.get(finished.reason, "")]
    return " · ".join(part for part in parts if part)


def _speeds(answer: Answer) -> Sequence[str]:
    if answer.first_token is None or answer.last_token is None:
        return ()
    parts = [f"first token {1000 * (answer.first_token - answer.started):.0f} ms"]
    if answer.last_token > answer.first_token and answer.num_tokens > 1:
        parts.append(f"{(answer.num_tokens - 1) / (answer.last_token - answer.first_token):.1f} tok/s")
    return parts


def _usage(usage: generation_pb2.Usage) -> str:
    return f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached), {usage.completion_tokens} generated"


def _handoff(timings: generation_pb2.Timings) -> str:
    if timings.transport not in TRANSPORTS:
        return ""
    return f"hand-off {timings.handoff_us / 1000:.1f} ms, {timings.handoff_bytes / 1e6:.1f} MB over {TRANSPORTS[timings.transport]}"

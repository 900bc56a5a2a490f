"""Requests to any server with OpenAI's completions API, streamed over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.generator import Clock
from bench.records import Record
from bench.sse import EventParser

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 600.0
# Words that are one token each, with the space before them, in the byte-pair vocabularies in use.
WORDS = (
    "time",
    "people",
    "water",
    "first",
    "place",
    "world",
    "house",
    "right",
    "small",
    "large",
    "light",
    "story",
    "point",
    "night",
)
# What not every server takes; the first that a server refuses is left out, then the next.
EXTRAS: tuple[tuple[str, Any], ...] = (
    ("return_token_ids", True),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", True),
)
REFUSALS = (400, 404, 422)


@dataclass(frozen=True)
class OpenAiTarget:
    """A server, the model's name there, whether prompts go as token ids or as words, and which extras it takes."""

    url: str
    model: str
    as_text: bool = False
    extras: tuple[str, ...] = tuple(name for name, _ in EXTRAS)

    @property
    def exact(self) -> bool:
        return "ignore_eos" in self.extras

    def body(self, prompt: Sequence[int], completion_tokens: int) -> dict[str, Any]:
        extras = {name: value for name, value in EXTRAS if name in self.extras}
        return {
            "model": self.model,
            "prompt": words(prompt) if self.as_text else list(prompt),
            "max_tokens": completion_tokens,
            "temperature": 0,
            "stream": True,
            **extras,
        }


def words(prompt: Sequence[int]) -> str:
    """As many words as there are tokens; random as they are, so that no two prompts share a long prefix."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in prompt)


class StreamFailedError(Exception):
    """What the server says within its stream; the message is the error's name."""


class OpenAiClient:
    """Connections to one server. Needs httpx."""

    def __init__(self, target: OpenAiTarget) -> None:
        import httpx

        self._target = target
        self.exact = target.exact
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT_S, limits=limits, trust_env=False)

    async def send(self, prompt: Sequence[int], completion_tokens: int, record: Record, clock: Clock) -> None:
        import httpx

        try:
            async with self._stream(self._target.body(prompt, completion_tokens)) as response:
                if response.is_success:
                    await _note_stream(response, record, clock)
                else:
                    record.error = f"HTTP {response.status_code}"
        except httpx.HTTPError as error:
            record.error = type(error).__name__
        except StreamFailedError as error:
            record.error = str(error)

    async def close(self) -> None:
        await self._http.aclose()

    async def refusal(self, prompt: Sequence[int]) -> str | None:
        """Why the server takes no such request; None if it does."""
        async with self._stream(self._target.body(prompt, 2)) as response:
            content = (await response.aread()).decode("utf-8", "replace")
            return None if response.is_success else f"HTTP {response.status_code}: {content[:300]}"

    def _stream(self, body: dict[str, Any]) -> Any:
        return self._http.stream("POST", "/v1/completions", json=body)


async def negotiate(target: OpenAiTarget, vocabulary_size: int) -> OpenAiTarget:
    """The target as the server takes it, found by asking: without the extras that it refuses. SystemExit if it takes none, or is
    not there."""
    import httpx

    prompt = [min(200 + number, vocabulary_size - 1) for number in range(8)]
    while True:
        client = OpenAiClient(target)
        try:
            refusal = await client.refusal(prompt)
        except httpx.HTTPError as error:
            raise SystemExit(f"{target.url} cannot be asked: {error or type(error).__name__}") from error
        finally:
            await client.close()
        if refusal is None:
            return target
        if not target.extras or not refusal.startswith(tuple(f"HTTP {code}" for code in REFUSALS)):
            raise SystemExit(f"{target.url} does not serve {target.model}: {refusal}")
        target = replace(target, extras=target.extras[1:])


async def _note_stream(response: httpx.Response, record: Record, clock: Clock) -> None:
    parser = EventParser()
    async for piece in response.aiter_bytes():
        now_us = clock.now_us()
        for event in parser.feed(piece):
            if event == "[DONE]":
                record.completion_tokens = record.completion_tokens or sum(record.counts)
                return
            _note_chunk(json.loads(event), record, now_us)
    raise StreamFailedError("NO_END")


def _note_chunk(chunk: dict[str, Any], record: Record, now_us: int) -> None:
    """A chunk without tokens of its own, as the one with the usage, is no arrival."""
    if error := chunk.get("error"):
        raise StreamFailedError(str(error.get("type") or error.get("code") or "ERROR") if isinstance(error, dict) else "ERROR")
    for choice in chunk.get("choices") or ():
        ids = choice.get("token_ids")
        num_tokens = len(ids) if ids is not None else int(bool(choice.get("text")) or choice.get("finish_reason") is None)
        if num_tokens:
            record.note_arrival(now_us, num_tokens)
    if usage := chunk.get("usage"):
        record.completion_tokens = usage.get("completion_tokens", 0)
        record.prompt_tokens = usage.get("prompt_tokens", record.prompt_tokens)
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

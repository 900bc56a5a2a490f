"""What to ask, by seed, and the answers that an undisturbed suite gives.

For the fake model the answers are computed; for a real one each question is asked once while nothing is harmed, and only questions
whose likeliest token leads clearly at every step are used: a moved request computes some of its KV in other batches, whose last
bits differ, and a near tie may then fall the other way.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from llm.sampling import SampleRow, sample
from llm.sampling_params import SamplingParams
from tandem.api.v1 import generation_pb2
from tests.fakes.runner import VOCABULARY_SIZE, logits_of, next_letter
from tests.faults.oracle import Expected, Record
from tests.faults.traffic import DEADLINE_S, Arrival, Asked, choose_kind, converse

DATA = Path(__file__).resolve().parents[1] / "data"
CLEAR_LEAD = 0.1
"""Of log-probability: far more than the last bits of bfloat16 KV move it in this model, as its own reference run shows."""


def fake_question(number: int, arrival: Arrival, seed: int, kind: str | None = None) -> Asked:
    """A request for the fake model and its answer: a function of the arguments only."""
    chance = random.Random(f"{seed}:{number}")
    kind = kind or choose_kind(chance)
    prompt = [chance.randrange(3, VOCABULARY_SIZE) for _ in range(arrival.prompt_tokens)]
    max_tokens = arrival.completion_tokens
    sampling: dict[str, Any] = {"temperature": 0.0}
    if kind == "sampled":
        sampling = {
            "temperature": chance.choice((0.7, 1.0, 1.5)),
            "seed": chance.getrandbits(63),
            "repetition_penalty": chance.choice((1.0, 1.1)),
            "presence_penalty": chance.choice((0.0, 0.5)),
            "frequency_penalty": chance.choice((0.0, 0.5)),
        }
    tokens = fake_completion(prompt, max_tokens, SamplingParams(**{"seed": 0, **sampling}))
    text, finish, stop = spelled(tokens), "length", []
    if kind == "stop":
        assert text is not None, "greedy completions are letters"
        where = chance.randrange(1, max(2, len(text) - 1))
        stop = [text[where : where + 2]]
        tokens, text, finish = stopped_at(tokens, text, stop[0])
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParams(**sampling),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens, stop=stop, ignore_eos=True),
    )
    return _of_kind(number, kind, request, Expected(tuple(tokens), text, finish), chance)


def fake_completion(prompt: Sequence[int], num_tokens: int, params: SamplingParams) -> list[int]:
    """What the fake model draws, undisturbed."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        likeliest = next_letter(tokens)
        if params.is_greedy and not params.has_penalties:
            tokens.append(likeliest)
        else:
            tokens.append(sample(logits_of([likeliest]), [SampleRow(params, tokens, len(prompt))])[0].token_id)
    return tokens[len(prompt) :]


def spelled(tokens: Sequence[int]) -> str | None:
    """The text of byte-level tokens; None if it is not plain ASCII, whose text needs a detokenizer to tell."""
    text = bytes(max(token - 3, 0) for token in tokens)
    return text.decode() if text.isascii() and min(tokens) >= 3 else None


def stopped_at(tokens: Sequence[int], text: str, stop: str) -> tuple[list[int], str, str]:
    """Tokens, text and finish reason with a stop string; one letter a token."""
    found = text.find(stop)
    assert found >= 0, "the stop string is part of the text"
    return list(tokens[: found + len(stop)]), text[:found], "stop"


def _of_kind(number: int, kind: str, request: generation_pb2.GenerateRequest, expected: Expected, chance: random.Random) -> Asked:
    match kind:
        case "logprobs":
            request.output.logprobs = chance.randrange(0, 4)
        case "cancel":
            return Asked(number, kind, request, expected, cancel_after=chance.randrange(0, len(expected.tokens)))
        case "deadline":
            return Asked(number, kind, request, expected, deadline_s=chance.choice((0.005, 0.05, 0.2)))
        case "bad":
            request.sampling.top_p = chance.choice((float("nan"), -1.0, 2.0))
            return Asked(number, kind, request, None)
    return Asked(number, kind, request, expected)


class RealQuestions:
    """A fixed set of questions for a real model, each with the answer that the suite gave before anything was harmed."""

    def __init__(self) -> None:
        self._known: list[Asked] = []

    async def learn(self, channel: grpc.aio.Channel, arrivals: Sequence[Arrival], count: int, seed: int) -> None:
        """Asks, one after the other, until `count` questions have answers whose every token leads clearly."""
        chance, story = random.Random(seed), _story()
        while len(self._known) < count:
            asked = _real_question(len(self._known), chance.choice(arrivals), story, chance)
            record = Record(asked.number, "plain", 0, DEADLINE_S, None)
            await converse(channel, _with_leads(asked), record)
            if record.code != "OK":
                raise RuntimeError(f"an undisturbed request failed: {record.code} {record.message}")
            if record.smallest_lead >= CLEAR_LEAD:
                expected = Expected(tuple(record.tokens), record.text, record.finish)
                self._known.append(Asked(asked.number, "plain", asked.request, expected))

    def question(self, number: int, seed: int, kind: str | None = None) -> Asked:
        """One of the known questions, asked in one of the ways whose answer does not depend on it."""
        chance = random.Random(f"{seed}:{number}")
        known = chance.choice(self._known)
        kind = kind or choose_kind(chance)
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(known.request)
        assert known.expected is not None
        return _of_kind(number, "plain" if kind in ("sampled", "stop") else kind, request, known.expected, chance)


def _story() -> list[int]:
    """Tokens of real text, to cut prompts from."""
    prompts = json.loads((DATA / "smollm2_greedy.json").read_text())["prompts"]
    return [token for prompt in prompts for token in prompt["prompt_ids"]]


def _real_question(number: int, arrival: Arrival, story: Sequence[int], chance: random.Random) -> Asked:
    start = chance.randrange(len(story))
    prompt = [story[(start + step) % len(story)] for step in range(arrival.prompt_tokens)]
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParams(temperature=0.0),
        stopping=generation_pb2.StoppingParams(max_tokens=arrival.completion_tokens, ignore_eos=True),
    )
    return Asked(number, "plain", request, None)


def _with_leads(asked: Asked) -> Asked:
    request = generation_pb2.GenerateRequest()
    request.CopyFrom(asked.request)
    request.output.logprobs = 2
    return Asked(asked.number, "plain", request, None)

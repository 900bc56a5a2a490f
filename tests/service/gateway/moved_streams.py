"""What tests of lost workers share: one request, its tokens in a quiet run, and a worker killed at a moment of it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tests.fakes.workers import FakeWorker, letters
from tests.service.gateway.conftest import Answer, Suite, collect

PROMPT = [3 + byte for byte in b"hello"]
PREFILL_PHASES = ("queue", "admit", "run")


def expected(num_tokens: int) -> list[int]:
    return [letters(PROMPT, index) for index in range(num_tokens)]


def first_choice(workers: Sequence[FakeWorker]) -> tuple[Any, Any]:
    """Of two idle workers: the one that is chosen, and the other."""
    chosen, other = sorted(workers, key=lambda worker: worker.address)
    return chosen, other


async def interrupted(suite: Suite, worker: FakeWorker, phase: str, **fields: object) -> Answer:
    """A request whose worker is killed at a phase: at "token N" the client has all tokens before it."""
    worker.gates.close(phase)
    answer = Answer()
    call = suite.call(**{"text": "hello", "stopping": {"max_tokens": 10}, **fields})
    answering = asyncio.create_task(collect(call, answer))
    await worker.gates.reached(phase)
    await suite.until(lambda: len(answer.token_ids) >= int(phase.partition("token ")[2] or 0))
    await worker.kill()
    return await answering

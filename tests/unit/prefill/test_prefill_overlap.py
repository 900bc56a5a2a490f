"""Prefill steps that are launched before the one before them is complete."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kv.allocator import BlockAllocator
from llm.kv.pool import KvPool
from llm.sampling_params import SamplingParams
from prefill_svc.batcher import BatcherLimits, PrefillBatcher, PromptState
from prefill_svc.engine import PrefillEngine
from prefill_svc.job import Finished, PrefillJob, Progress
from tandem.engine_thread import Courier
from tests.fakes.device_runner import DeviceRunner, FakeDrawnStep
from tests.fakes.runner import LAYOUT, next_token


class Suite:
    """An engine over the fake model, a step at a time."""

    def __init__(self, num_blocks: int = 64, token_budget: int = 8) -> None:
        self.runner = DeviceRunner(KvPool.create(LAYOUT, num_blocks))
        self.allocator = BlockAllocator(num_blocks, LAYOUT.block_tokens)
        batcher = PrefillBatcher(self.allocator, BatcherLimits(token_budget))
        courier = Courier(asyncio.get_running_loop())
        nobody = lambda *_: None  # noqa: E731
        self.engine = PrefillEngine(self.runner, self.allocator, batcher, courier, on_failure=nobody, on_change=nobody)  # type: ignore[arg-type]

    async def step(self) -> bool:
        stepped = self.engine.step()
        await asyncio.sleep(0)
        return stepped


def job(token_ids: Sequence[int], **named: object) -> PrefillJob:
    return PrefillJob(PromptState(list(token_ids)), len(token_ids), SamplingParams(temperature=0.0), (), **named)  # type: ignore[arg-type]


def news(one: PrefillJob) -> list[object]:
    told = list(one.mailbox._pending)
    one.mailbox._pending.clear()
    return told


async def test_chunks_are_launched_ahead_and_told_when_they_are_in_the_pool() -> None:
    suite, prompt = Suite(), list(range(1, 30))
    one = job(prompt)
    suite.engine.submit(one)
    told = 0
    while await suite.step():
        for event in news(one):
            if isinstance(event, Progress):
                told = event.num_computed_tokens
                assert suite.runner._read(one.prompt.block_ids, told).tolist() == prompt[:told]
            if isinstance(event, Finished):
                assert event.token.token_id == next_token(prompt)
    assert told == len(prompt)
    assert suite.runner.most_in_flight == 2
    assert suite.runner.sizes == [[8], [8], [8], [5]]


async def test_blocks_are_told_of_before_the_first_token_is_drawn() -> None:
    """Whoever copies them need not wait for it; and they are as they will be."""
    suite, prompt = Suite(), [5, 6, 7]
    one, told, steps = job(prompt), [], []
    start_step = suite.runner.start_step

    def start_and_keep(*arguments: Any) -> FakeDrawnStep:
        steps.append(start_step(*arguments))
        return steps[-1]

    def tell(deliveries: Sequence[tuple[object, object]]) -> None:
        for _, event in deliveries:
            told.append((type(event), steps[-1].drawn))
            if isinstance(event, Progress):
                assert suite.runner._read(one.prompt.block_ids, event.num_computed_tokens).tolist() == prompt

    suite.engine.submit(one)
    suite.runner.start_step = start_and_keep  # type: ignore[method-assign]
    suite.engine._courier.send = tell  # type: ignore[method-assign,assignment]
    while await suite.step():
        pass
    assert told == [(Progress, None), (Finished, [next_token(prompt)])]


async def test_prompt_logprobs_are_the_hosts_affair_and_wait_for_no_one_else() -> None:
    suite = Suite()
    plain, special = job(range(20)), job(range(50, 60), num_prompt_logprobs=1)
    for each in (plain, special):
        suite.engine.submit(each)
    while await suite.step():
        pass
    for each in (plain, special):
        (finished,) = [event for event in news(each) if isinstance(event, Finished)]
        assert finished.token.token_id == next_token(each.prompt.token_ids)
    assert len(special.prompt_logprobs) == 9


async def test_a_prompt_closed_under_two_steps_keeps_its_blocks_until_both_are_over() -> None:
    suite = Suite()
    one = job(range(40))
    suite.engine.submit(one)
    await suite.step()
    await suite.step()
    suite.engine.close(one)
    assert suite.allocator.num_free == 54
    await suite.step()
    assert suite.allocator.num_free == 64


@pytest.mark.parametrize("num_blocks", [12, 40])
@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=6), closed=st.integers(0, 9))
def test_first_tokens_are_right_whatever_is_packed_shared_and_cancelled(
    num_blocks: int, prompts: list[list[int]], closed: int
) -> None:
    asyncio.run(_run(num_blocks, prompts, closed))


async def _run(num_blocks: int, prompts: list[list[int]], closed: int) -> None:
    """Prompts begin alike, so that blocks of finished ones serve again; one is closed after some steps."""
    suite, jobs = Suite(num_blocks), [job(prompt) for prompt in prompts]
    for each in jobs:
        suite.engine.submit(each)
    turns = 0
    while await suite.step():
        if turns == closed:
            suite.engine.close(jobs[closed % len(jobs)])
        for each in jobs:
            for event in news(each):
                if isinstance(event, Finished):
                    assert event.token.token_id == next_token(each.prompt.token_ids)
                    assert np.array_equal(suite.runner._read(each.prompt.block_ids, each.prompt.num_tokens), each.prompt.token_ids)
                    suite.engine.close(each)
        turns += 1
    suite.allocator.check_integrity()
    assert suite.allocator.num_free == num_blocks

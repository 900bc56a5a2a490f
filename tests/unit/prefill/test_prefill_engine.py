"""The prefill engine without a worker around it: a step at a time, on the test's own thread."""

import asyncio
from collections.abc import Sequence

import pytest
import torch

from llm.batch import SequenceSlice
from llm.kv.allocator import BlockAllocator
from llm.sampling_params import SamplingParams
from prefill_svc.batcher import BatcherLimits, PrefillBatcher, PromptState
from prefill_svc.engine import PrefillEngine
from prefill_svc.job import Admitted, Failed, Finished, PrefillJob, Progress
from tandem.engine_thread import Courier
from tandem.errors import Reason, TandemError

BLOCK_TOKENS = 4


class Runner:
    """Draws token 0; fails if told to."""

    failure: Exception | None = None

    def adopt_thread(self) -> None: ...

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return torch.zeros(sum(piece.logits == "last" for piece in slices), 8)


class Bench:
    """An engine whose thread is not started, and what it told its owner."""

    def __init__(self, num_blocks: int = 8) -> None:
        self.runner, self.allocator = Runner(), BlockAllocator(num_blocks, BLOCK_TOKENS)
        self.failures: list[Exception] = []
        self.num_changes = 0
        self.now = 0.0
        batcher = PrefillBatcher(self.allocator, BatcherLimits(token_budget=8))
        courier = Courier(asyncio.get_running_loop())
        self.engine = PrefillEngine(
            self.runner,
            self.allocator,
            batcher,
            courier,
            on_failure=self.failures.append,
            on_change=self._changed,
            clock=lambda: self.now,
        )  # type: ignore[arg-type]

    def _changed(self) -> None:
        self.num_changes += 1


def job(num_tokens: int) -> PrefillJob:
    return PrefillJob(PromptState(list(range(num_tokens))), num_tokens, SamplingParams(temperature=0.0), ())


async def test_events_of_a_job_come_in_order_and_each_change_is_told() -> None:
    bench = Bench()
    one = job(10)
    bench.engine.submit(one)
    assert bench.num_changes == 1
    assert [bench.engine.step() for _ in range(3)] == [True, True, False]
    assert bench.num_changes == 3
    await asyncio.sleep(0)
    events = await one.mailbox.take()
    assert [type(event) for event in events] == [Admitted, Progress, Progress, Finished]
    bench.engine.close(one)
    assert bench.num_changes == 4
    assert bench.allocator.num_free == bench.allocator.num_blocks


async def test_a_ticket_outlives_its_job_and_then_makes_room_for_the_next() -> None:
    bench = Bench(num_blocks=3)
    first, second = job(10), job(10)
    bench.engine.submit(first)
    assert bench.engine.share(first)
    bench.engine.submit(second)
    while bench.engine.step():
        pass
    bench.engine.close(first)
    assert bench.engine.load().num_waiting == 1
    bench.engine.free(first.prompt.block_ids)
    assert bench.engine.load().num_waiting == 0
    bench.engine.close(second)
    assert bench.allocator.num_free == 3


async def test_a_job_that_comes_after_the_engine_failed_is_refused_and_does_not_wait_for_ever() -> None:
    bench = Bench()
    bench.runner.failure = RuntimeError("injected")
    early = job(3)
    bench.engine.submit(early)
    bench.engine.start()
    (event,) = [event for event in await _until_failed(early) if isinstance(event, Failed)]
    assert event.error.reason is Reason.ENGINE_FAILED
    with pytest.raises(TandemError) as caught:
        bench.engine.submit(job(3))
    assert caught.value.reason is Reason.ENGINE_FAILED
    assert bench.engine.stop()
    assert bench.failures == [bench.runner.failure]


async def _until_failed(one: PrefillJob) -> list[object]:
    events: list[object] = []
    async with asyncio.timeout(10):
        while not any(isinstance(event, Failed) for event in events):
            events += await one.mailbox.take()
    return events


async def test_what_is_late_leaves_whether_it_waits_or_runs_and_is_computed_no_further() -> None:
    bench = Bench(num_blocks=5)
    running, waiting, patient = job(20), job(20), job(20)
    running.prompt.deadline, waiting.prompt.deadline = 1.0, 2.0
    for each in (running, waiting, patient):
        bench.engine.submit(each)
    assert bench.engine.step()
    bench.now = 2.0
    assert bench.engine.step()
    assert (running.prompt.num_scheduled_tokens, waiting.prompt.num_scheduled_tokens) == (8, 0)
    await asyncio.sleep(0)
    for late in (running, waiting):
        *_, last = await late.mailbox.take()
        assert isinstance(last, Failed) and last.error.reason is Reason.DEADLINE_EXCEEDED
        bench.engine.close(late)
    assert (patient.prompt.num_cached_tokens, patient.prompt.num_computed_tokens) == (8, 16)
    bench.engine.close(patient)
    assert bench.allocator.num_free == bench.allocator.num_blocks


async def test_a_late_prompt_is_not_admitted_when_room_comes() -> None:
    bench = Bench(num_blocks=5)
    first, late = job(20), job(20)
    late.prompt.deadline = 1.0
    bench.engine.submit(first)
    bench.engine.submit(late)
    bench.now = 1.0
    bench.engine.close(first)
    assert late.prompt.block_ids == []
    bench.engine.close(late)
    assert bench.allocator.num_free == bench.allocator.num_blocks


async def test_blocks_of_a_job_that_ended_before_its_ticket_was_granted_are_not_shared() -> None:
    bench = Bench(num_blocks=3)
    late, next_one = job(10), job(10)
    late.prompt.deadline = 1.0
    bench.engine.submit(late)
    bench.engine.submit(next_one)
    bench.now = 1.0
    assert bench.engine.step()
    assert not bench.engine.share(late)
    assert next_one.prompt.block_ids == late.prompt.block_ids
    for each in (late, next_one):
        bench.engine.close(each)
    assert bench.allocator.num_free == 3

"""The decode engine without a worker around it: a step at a time, on the test's own thread."""

import asyncio
from collections.abc import Sequence

import pytest
import torch

from decode_svc.batcher import BatcherLimits, DecodeBatcher, SequenceState
from decode_svc.engine import DecodeEngine
from decode_svc.job import DecodeJob, Drawn, Ended, EndReason, Failed, StopRule
from llm.batch import SequenceSlice
from llm.kv.allocator import BlockAllocator
from llm.sampling_params import SamplingParams
from tandem.engine_thread import Courier
from tandem.errors import Reason, TandemError

BLOCK_TOKENS = 4


class Runner:
    """Draws token 0; `during`, if set, is called in the middle of each step."""

    def __init__(self) -> None:
        self.during = lambda: None

    def adopt_thread(self) -> None: ...

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        self.during()
        return torch.zeros(sum(piece.logits == "last" for piece in slices), 8)


class Bench:
    """An engine whose thread is not started, and what it told its owner."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.runner, self.allocator = Runner(), BlockAllocator(num_blocks, BLOCK_TOKENS, prefix_cache=False)
        self.failures: list[Exception] = []
        self.num_changes = 0
        self.now = 0.0
        batcher = DecodeBatcher(self.allocator, BatcherLimits())
        courier = Courier(asyncio.get_running_loop())
        self.engine = DecodeEngine(
            self.runner,
            self.allocator,
            batcher,
            courier,
            on_failure=self.failures.append,
            on_change=self._changed,
            clock=lambda: self.now,
        )  # type: ignore[arg-type]

    @property
    def idle(self) -> bool:
        self.allocator.check_integrity()
        return self.allocator.num_free == self.allocator.num_blocks

    def _changed(self) -> None:
        self.num_changes += 1


def job(num_tokens: int = 6, max_tokens: int = 8, **rule: object) -> DecodeJob:
    stop_rule = StopRule(**{"end_token_ids": frozenset(), "min_tokens": 0, "max_tokens": max_tokens, **rule})  # type: ignore[arg-type]
    sequence = SequenceState([1] * num_tokens, num_tokens + max_tokens)
    return DecodeJob(sequence, num_tokens, SamplingParams(temperature=0.0), stop_rule)


async def test_tokens_come_in_order_and_each_coming_and_going_is_told() -> None:
    bench = Bench()
    one = job(max_tokens=3)
    bench.engine.reserve(one)
    bench.engine.activate(one, 5)
    assert bench.num_changes == 2
    assert [bench.engine.step() for _ in range(3)] == [True, True, False]
    assert bench.num_changes == 2, "steps are not told of"
    await asyncio.sleep(0)
    events = await one.mailbox.take()
    assert [(type(event), getattr(event, "index", None)) for event in events] == [(Drawn, 1), (Drawn, 2), (Ended, None)]
    assert bench.idle, "the end frees the blocks, whether or not anyone has read it"
    bench.engine.close(one)
    assert bench.idle and bench.num_changes == 3


@pytest.mark.parametrize(
    ("rule", "reason"),
    [({"max_tokens": 1}, EndReason.LENGTH), ({"end_token_ids": frozenset([5])}, EndReason.STOP)],
)
async def test_a_completion_that_the_first_token_ends_takes_no_step(rule: dict[str, object], reason: EndReason) -> None:
    bench = Bench()
    one = job(**rule)  # type: ignore[arg-type]
    bench.engine.reserve(one)
    bench.engine.activate(one, 5)
    assert not bench.engine.step()
    assert bench.idle
    await asyncio.sleep(0)
    assert await one.mailbox.take() == [Ended(reason)]
    bench.engine.close(one)
    assert bench.idle


async def test_a_job_closed_in_the_middle_of_a_step_keeps_its_blocks_until_the_step_ends() -> None:
    bench = Bench()
    leaving, staying = job(), job()
    for each in (leaving, staying):
        bench.engine.reserve(each)
        bench.engine.activate(each, 5)

    def leave() -> None:
        bench.engine.close(leaving)
        assert bench.allocator.num_free == 12

    bench.runner.during = leave
    assert bench.engine.step()
    assert bench.allocator.num_free == 14
    bench.engine.close(staying)
    assert bench.idle


async def test_a_job_closed_while_its_blocks_are_on_the_way_gives_them_back() -> None:
    bench = Bench()
    one = job()
    bench.engine.reserve(one)
    bench.engine.close(one)
    assert bench.idle


async def test_after_a_failure_everybody_is_told_and_nobody_else_taken_in() -> None:
    bench = Bench()
    failure = RuntimeError("injected")

    def explode() -> None:
        raise failure

    bench.runner.during = explode
    active, pulling = job(), job()
    for each in (active, pulling):
        bench.engine.reserve(each)
    bench.engine.activate(active, 5)
    bench.engine.start()
    async with asyncio.timeout(10):
        for each in (active, pulling):
            (event,) = await each.mailbox.take()
            assert isinstance(event, Failed)
    with pytest.raises(TandemError) as caught:
        bench.engine.reserve(job())
    assert caught.value.reason is Reason.ENGINE_FAILED
    assert bench.engine.stop()
    assert bench.failures == [failure]
    for each in (active, pulling):
        bench.engine.close(each)


async def test_a_late_sequence_ends_before_the_next_step_and_gives_its_blocks_back() -> None:
    bench = Bench()
    late, other = job(), job()
    late.sequence.deadline = 1.0
    for each in (late, other):
        bench.engine.reserve(each)
        bench.engine.activate(each, 5)
    bench.engine.step()
    bench.now = 1.0
    bench.engine.step()
    assert (late.num_completion_tokens, other.num_completion_tokens) == (2, 3)
    await asyncio.sleep(0)
    *_, last = await late.mailbox.take()
    assert isinstance(last, Failed) and last.error.reason is Reason.DEADLINE_EXCEEDED
    bench.engine.close(late)
    bench.engine.close(other)
    assert bench.idle


async def test_blocks_that_a_pull_still_writes_to_stay_when_the_deadline_passes() -> None:
    bench = Bench()
    late = job()
    late.sequence.deadline = 1.0
    bench.engine.reserve(late)
    bench.now = 2.0
    bench.engine.step()
    assert not bench.idle
    bench.engine.close(late)
    assert bench.idle

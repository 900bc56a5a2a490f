"""Steps that are launched before the one before them is read give the tokens of steps that are not."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_svc.batcher import BatcherLimits, DecodeBatcher, SequenceState, Stage
from decode_svc.engine import DecodeEngine
from decode_svc.job import DecodeJob, Drawn, Ended, Failed, StopRule
from llm.kv.allocator import BlockAllocator
from llm.kv.pool import KvPool
from llm.runner import SequenceSlice
from llm.sampling_params import SamplingParams
from tandem.engine_thread import Courier
from tandem.errors import TandemError
from tests.fakes.device_runner import DeviceRunner
from tests.fakes.runner import LAYOUT, FakeRunner, StampError, next_token

PLAIN = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=4.0, top_k=100, seed=7)
PENALISED = SamplingParams(temperature=0.0, frequency_penalty=2.0)


@dataclass
class Asked:
    """A request: what a client would send, and what it was told."""

    prompt: list[int]
    rule: StopRule
    sampling: SamplingParams
    num_logprobs: int | None
    job: DecodeJob | None = None
    copy: "Copy | None" = None
    """The last that was begun of its KV."""
    told: list[object] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token.token_id for event in self.told if isinstance(event, Drawn)]

    @property
    def ended(self) -> bool:
        return any(isinstance(event, Ended) for event in self.told)


class Copy:
    """A copy of a prompt's KV that a device makes when somebody waits for it, as an event that steps may come after."""

    cuda_event = 0

    def __init__(self, runner: "Runner", block_ids: Sequence[int], prompt: list[int], *, damaged: bool) -> None:
        self._runner, self._block_ids, self._prompt, self._damaged = runner, block_ids, prompt, damaged
        self.is_made = False

    def make(self) -> None:
        """Whole blocks: what lies behind the prompt in the last of them is overwritten, too."""
        if not self.is_made:
            self.is_made = True
            self._runner._pool[list(self._block_ids)] = -1.0
            if not self._damaged:
                self._runner._write(self._block_ids, np.asarray(self._prompt), 0)


class Runner(DeviceRunner):
    """Draws something from KV that is not right, if that is not verified yet, and only then. `unverified`: such blocks."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(*args, **named)
        self.unverified: set[int] = set()
        self.wait_for = Copy.make  # type: ignore[assignment]

    def _rows(self, piece: SequenceSlice) -> list[int]:
        try:
            return super()._rows(piece)
        except StampError:
            if not self.unverified.issuperset(piece.block_ids[: -(-piece.start // LAYOUT.block_tokens)]):
                raise
            self._pool[piece.block_ids[piece.start // LAYOUT.block_tokens], :, :, :, piece.start % LAYOUT.block_tokens] = -2.0
            return [13]


class Suite:
    """An engine over the fake model, a step at a time, and the pull of each prompt's KV."""

    def __init__(self, kind: type[FakeRunner], num_blocks: int, **limits: int) -> None:
        self.pool = KvPool.create(LAYOUT, num_blocks)
        self.pool.tensor.fill_(-3.0)
        self.runner = kind(self.pool)
        self.allocator = BlockAllocator(num_blocks, LAYOUT.block_tokens, prefix_cache=False)
        batcher = DecodeBatcher(self.allocator, BatcherLimits(**limits))
        courier = Courier(asyncio.get_running_loop())
        nobody = lambda *_: None  # noqa: E731
        self.engine = DecodeEngine(self.runner, self.allocator, batcher, courier, on_failure=nobody, on_change=nobody)  # type: ignore[arg-type]

    def reserve(self, asked: Asked) -> bool:
        sequence = SequenceState(list(asked.prompt), len(asked.prompt) + asked.rule.max_tokens)
        job = DecodeJob(sequence, len(asked.prompt), asked.sampling, asked.rule, asked.num_logprobs)
        try:
            block_ids = self.engine.reserve(job)
        except TandemError:
            return False
        asked.job = job
        if isinstance(self.runner, Runner):
            self.runner.unverified.update(block_ids)
        else:
            self.runner._write(block_ids, np.asarray(asked.prompt), 0)
        return True

    def expect(self, asked: Asked, *, damaged: bool = False) -> None:
        """Begins another copy of its KV; a pull that has begun one has withdrawn it before."""
        assert asked.job is not None
        if asked.copy is not None:
            asked.copy.make()  # a pull waits for it before it begins another
            self.engine.withdraw(asked.job)
        asked.copy = Copy(self.runner, self._blocks_of(asked), asked.prompt, damaged=damaged)
        self.engine.expect(asked.job, next_token(asked.prompt), [asked.copy])

    def activate(self, asked: Asked) -> None:
        assert asked.job is not None
        if isinstance(self.runner, Runner):
            if asked.copy is None or asked.copy._damaged:
                self.expect(asked)
            asked.copy.make()
            self.runner.unverified.difference_update(asked.job.sequence.block_ids)
        self.engine.activate(asked.job, next_token(asked.prompt))

    def close(self, asked: Asked) -> None:
        """As when its call is cancelled: its copies are waited for first."""
        assert asked.job is not None
        if asked.copy is not None:
            asked.copy.make()
        self.engine.close(asked.job)

    @staticmethod
    def _blocks_of(asked: Asked) -> Sequence[int]:
        return asked.job.sequence.block_ids[: -(-len(asked.prompt) // LAYOUT.block_tokens)]

    async def collect(self, everyone: list[Asked]) -> None:
        await asyncio.sleep(0)
        for asked in everyone:
            if asked.job is not None:
                asked.told += asked.job.mailbox._pending
                asked.job.mailbox._pending.clear()


async def alone(asked: Asked) -> list[int]:
    """The tokens after the first, one request at a time and one step at a time."""
    suite, copy = Suite(FakeRunner, 64), Asked(asked.prompt, asked.rule, asked.sampling, asked.num_logprobs)
    assert suite.reserve(copy)
    suite.activate(copy)
    while suite.engine.step():
        pass
    await suite.collect([copy])
    assert copy.ended
    return copy.tokens


requests = st.builds(
    Asked,
    prompt=st.lists(st.integers(0, 250), min_size=1, max_size=14),
    rule=st.builds(
        StopRule,
        end_token_ids=st.sampled_from([frozenset(), frozenset(range(0, 251, 5)), frozenset([3])]),
        min_tokens=st.sampled_from([0, 0, 0, 5]),
        max_tokens=st.integers(1, 24),
    ),
    sampling=st.sampled_from([PLAIN, PLAIN, PLAIN, SAMPLED, PENALISED]),
    num_logprobs=st.sampled_from([None, None, None, None, 1]),
)


@settings(max_examples=60, deadline=None)
@given(everyone=st.lists(requests, min_size=1, max_size=6), seed=st.integers(0, 2**32), num_blocks=st.sampled_from([10, 14, 40]))
def test_tokens_are_those_of_one_request_alone_and_one_step_at_a_time(everyone: list[Asked], seed: int, num_blocks: int) -> None:
    asyncio.run(_run(everyone, random.Random(seed), num_blocks))


async def _run(everyone: list[Asked], choice: random.Random, num_blocks: int) -> None:
    """Joins, steps and cancels in random order; blocks are few, so that some give way to others."""
    suite = Suite(Runner, num_blocks, max_batch=4, recompute_budget=6)
    waiting, pulling, running, cancelled = list(everyone), [], [], []
    turns = 0
    while waiting or pulling or running:
        turns += 1
        assert turns < 5000, "no progress"
        what = choice.choice(["reserve", "expect", "expect", "activate", "step", "step", "step", "step", "cancel"])
        if what == "reserve" and waiting and suite.reserve(waiting[-1]):
            pulling.append(waiting.pop())
        elif what == "expect" and pulling:
            suite.expect(choice.choice(pulling), damaged=choice.random() < 0.5)
        elif what == "activate" and pulling:
            running.append(pulling.pop(choice.randrange(len(pulling))))
            suite.activate(running[-1])
        elif what == "cancel" and running and choice.random() < 0.1:
            cancelled.append(running.pop(choice.randrange(len(running))))
            suite.close(cancelled[-1])
        elif what == "cancel" and pulling and choice.random() < 0.1:
            suite.close(pulling.pop())
        else:
            suite.engine.step()
        await suite.collect(everyone)
        running = [asked for asked in running if not asked.ended]
        if not running and not pulling and waiting:
            first = waiting.pop()
            pulling += [first] if suite.reserve(first) else []  # or it never fits
    while suite.engine.step():
        pass
    suite.allocator.check_integrity()
    assert suite.allocator.num_free == num_blocks
    for asked in everyone:
        if asked.ended:
            assert asked.tokens == await alone(asked)
        elif asked.job is not None and asked in cancelled:
            assert asked.tokens == (await alone(asked))[: len(asked.tokens)]


async def test_two_steps_are_in_flight_and_the_host_learns_a_step_late() -> None:
    suite = Suite(DeviceRunner, 16)
    asked = Asked([1, 2, 3], StopRule(frozenset(), 0, 6), PLAIN, None)
    assert suite.reserve(asked)
    suite.activate(asked)
    told = []
    while suite.engine.step():
        await suite.collect([asked])
        told.append(len(asked.tokens))
    assert told == [0, 1, 2, 3, 4, 5], "and no step computes more than was asked for"
    assert suite.runner.most_in_flight == 2
    assert suite.runner.sizes == [[1]] * 5


async def test_a_row_for_the_host_takes_part_in_every_second_step_and_holds_up_no_other() -> None:
    suite = Suite(DeviceRunner, 32)
    plain, special = (Asked([1, 2], StopRule(frozenset(), 0, 9), params, None) for params in (PLAIN, PENALISED))
    for asked in (plain, special):
        assert suite.reserve(asked)
        suite.activate(asked)
    told = []
    for _ in range(6):
        suite.engine.step()
        await suite.collect([plain, special])
        told.append((len(plain.tokens), len(special.tokens)))
    assert told == [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]
    assert suite.runner.most_in_flight == 2
    while suite.engine.step():
        pass
    await suite.collect([plain, special])
    assert [plain.tokens, special.tokens] == [await alone(plain), await alone(special)]
    assert suite.allocator.num_free == 32


async def test_a_failing_step_is_everybodys_failure() -> None:
    suite = Suite(DeviceRunner, 32)
    asked = Asked([1, 2], StopRule(frozenset(), 0, 9), PLAIN, None)
    assert suite.reserve(asked)
    suite.activate(asked)
    suite.engine.step()

    def explode() -> None:
        raise RuntimeError("injected")

    suite.runner.gate = explode
    suite.engine.start()
    async with asyncio.timeout(10):
        while not any(isinstance(event, Failed) for event in asked.told):
            await suite.collect([asked])
    assert suite.engine.stop()


@pytest.mark.parametrize("stage", [Stage.ACTIVE, Stage.PULLING])
async def test_blocks_of_a_cancelled_sequence_are_its_own_until_both_steps_are_over(stage: Stage) -> None:
    suite = Suite(DeviceRunner, 8)
    asked = Asked([1, 2, 3], StopRule(frozenset(), 0, 9), PLAIN, None)
    assert suite.reserve(asked)
    if stage is Stage.ACTIVE:
        suite.activate(asked)
        suite.engine.step()
        suite.engine.step()
    suite.engine.close(asked.job)
    assert (suite.allocator.num_free == 8) == (stage is Stage.PULLING)
    while suite.engine.step():
        pass
    assert suite.allocator.num_free == 8


def ask(max_tokens: int, *end_token_ids: int, prompt: Sequence[int] = (1, 2, 3, 4, 5), params: SamplingParams = PLAIN) -> Asked:
    return Asked(list(prompt), StopRule(frozenset(end_token_ids), 0, max_tokens), params, None)


async def settle(suite: Suite, asked: Asked) -> Asked:
    """Steps until there is nothing to do; with what it was told."""
    while suite.engine.step():
        pass
    await suite.collect([asked])
    return asked


@pytest.mark.parametrize("landed", [False, True])
async def test_what_is_drawn_of_unverified_kv_is_told_once_it_is_verified(landed: bool) -> None:
    suite, asked = Suite(Runner, 16), ask(4)
    assert suite.reserve(asked)
    suite.expect(asked)
    assert not asked.copy.is_made and suite.engine.step() and suite.runner.sizes == [], "launched before the copy is made"
    if landed:
        assert (await settle(suite, asked)).told == [] and suite.runner.sizes == [[1]], "one step, and no second"
    suite.activate(asked)
    await suite.collect([asked])
    assert asked.tokens == (await alone(asked))[: int(landed)], "at once, without another step"
    assert (await settle(suite, asked)).tokens == await alone(asked)
    assert suite.allocator.num_free == 16 and suite.runner.sizes == [[1]] * 3
    assert asked.job.started_ns <= asked.job.ready_ns


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("good", [False, True])
async def test_what_was_drawn_of_damaged_kv_is_thrown_away(landed: bool, good: bool) -> None:
    """The superfluous step writes behind the prompt, into a block that is pulled again; the first step after that overwrites it."""
    suite, asked = Suite(Runner, 16), ask(4)
    assert suite.reserve(asked)
    suite.expect(asked, damaged=True)
    assert suite.engine.step()
    if landed:
        await settle(suite, asked)
    suite.expect(asked, damaged=not good)
    assert suite.engine.step()
    if not good:
        assert (await settle(suite, asked)).told == []
    suite.activate(asked)
    assert (await settle(suite, asked)).tokens == await alone(asked)
    assert suite.allocator.num_free == 16


async def test_a_withdrawn_sequence_whose_pull_fails_keeps_its_blocks_until_its_step_is_over() -> None:
    suite, asked = Suite(Runner, 16), ask(4)
    assert suite.reserve(asked)
    suite.expect(asked, damaged=True)
    suite.engine.step()
    asked.copy.make()
    suite.engine.withdraw(asked.job)
    suite.engine.withdraw(asked.job)
    assert asked.job.started_ns == 0 and asked.job.sample_row(6).token_ids is asked.job.sequence.token_ids
    suite.close(asked)
    assert suite.allocator.num_free == 14
    assert (await settle(suite, asked)).told == []
    assert suite.allocator.num_free == 16


async def test_a_sequence_that_is_closed_before_it_is_verified_says_nothing() -> None:
    suite, asked = Suite(Runner, 16), ask(4)
    assert suite.reserve(asked)
    suite.expect(asked)
    suite.engine.step()
    suite.close(asked)
    assert suite.allocator.num_free == 14, "a step in flight uses them"
    suite.engine.withdraw(asked.job)
    assert (await settle(suite, asked)).told == []
    assert suite.allocator.num_free == 16


async def test_nobody_expects_a_step_of_a_completion_that_its_first_token_ends() -> None:
    first = next_token((1, 2, 3, 4, 5))
    for asked in (ask(1), ask(4, first)):
        suite = Suite(Runner, 16)
        assert suite.reserve(asked)
        suite.expect(asked)
        assert not suite.engine.step() and suite.allocator.num_free == 14, "a pull writes to the blocks"
        suite.activate(asked)
        assert [type(event) for event in (await settle(suite, asked)).told] == [Ended]
        assert suite.allocator.num_free == 16


@pytest.mark.parametrize("landed", [False, True])
async def test_a_second_token_that_ends_the_completion_ends_it_once_it_is_verified(landed: bool) -> None:
    (second,) = await alone(ask(2))
    for asked in (ask(2), ask(9, second)):
        suite = Suite(Runner, 16)
        assert suite.reserve(asked)
        suite.expect(asked)
        suite.engine.step()
        if landed:
            await settle(suite, asked)
        assert suite.allocator.num_free == 14
        suite.activate(asked)
        assert [type(event) for event in (await settle(suite, asked)).told] == [Drawn, Ended]
        assert asked.tokens == [second] and suite.allocator.num_free == 16


async def test_the_host_draws_nothing_from_unverified_kv() -> None:
    suite, asked = Suite(Runner, 16), ask(4, params=PENALISED)
    assert suite.reserve(asked)
    suite.expect(asked)
    assert not suite.engine.step()
    suite.activate(asked)
    assert (await settle(suite, asked)).tokens == await alone(asked)


async def test_where_steps_are_complete_when_launched_nobody_is_expected() -> None:
    suite, asked = Suite(FakeRunner, 16), ask(4)
    assert suite.reserve(asked)
    suite.engine.expect(asked.job, next_token(asked.prompt), [])
    assert not suite.engine.step()
    suite.activate(asked)
    assert (await settle(suite, asked)).tokens == await alone(asked)


async def test_others_go_on_beside_a_sequence_that_waits_for_its_verification() -> None:
    suite, other, asked = Suite(Runner, 16), ask(8), ask(8, prompt=(9, 9))
    for each in (other, asked):
        assert suite.reserve(each)
    suite.activate(other)
    suite.expect(asked)
    await settle(suite, other)
    assert other.ended and asked.told == []
    suite.activate(asked)
    assert (await settle(suite, asked)).tokens == await alone(asked)

"""Short prompts next to a flood of long ones, and the other way round."""

import heapq
import random
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.kv.allocator import BlockAllocator
from prefill_svc.batcher import BatcherLimits, PrefillBatcher, PromptState
from prefill_svc.fairness import LONG_SHARE, PATIENCE, share_step, short_tokens
from tandem.errors import Reason, TandemError

BLOCK_TOKENS = 16


@st.composite
def prompts_under_way(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Their sizes, and what is left of each."""
    sizes = draw(st.lists(st.integers(0, 3000), max_size=40))
    return sizes, [draw(st.integers(0, size)) for size in sizes]


@given(prompts_under_way(), st.integers(4, 2048))
def test_a_step_keeps_to_its_budget_and_is_never_empty(prompts: tuple[list[int], list[int]], budget: int) -> None:
    sizes, remaining = prompts
    shares = share_step(sizes, remaining, budget)
    assert len(shares) == len(remaining)
    assert all(0 <= share <= tokens for share, tokens in zip(shares, remaining, strict=True))
    assert sum(shares) <= budget
    assert bool(sum(shares)) == any(remaining)


@given(prompts_under_way(), st.integers(4, 2048))
def test_no_short_prompt_is_cut(prompts: tuple[list[int], list[int]], budget: int) -> None:
    sizes, remaining = prompts
    shares = share_step(sizes, remaining, budget)
    short = [index for index, size in enumerate(sizes) if size <= short_tokens(budget)]
    assert all(shares[index] in (0, remaining[index]) for index in short)


@given(prompts_under_way(), st.integers(4, 2048))
def test_the_oldest_of_each_kind_moves_on_in_every_step(prompts: tuple[list[int], list[int]], budget: int) -> None:
    sizes, remaining = prompts
    shares = share_step(sizes, remaining, budget)
    waiting = [index for index, tokens in enumerate(remaining) if tokens]
    oldest_short = next((i for i in waiting if sizes[i] <= short_tokens(budget)), None)
    oldest_long = next((i for i in waiting if sizes[i] > short_tokens(budget)), None)
    if oldest_short is not None:
        assert shares[oldest_short] == remaining[oldest_short], "a short prompt that is the oldest is computed at once"
        if oldest_long is not None:
            assert shares[oldest_long] >= min(remaining[oldest_long], budget // LONG_SHARE)
    elif oldest_long is not None:
        assert shares[oldest_long] >= min(remaining[oldest_long], budget), "nobody else is there"


@pytest.mark.parametrize(
    ("remaining", "shares"),
    [
        ([1024, 1024], [1024, 0]),
        ([600, 600], [600, 0]),
        ([500, 500, 500], [500, 500, 0]),
        ([10, 1020, 1020], [10, 1020, 0]),
        ([1025, 1025], [1025, 0]),
        ([8000, 8000], [2048, 0]),
    ],
)
def test_a_step_takes_whole_prompts_up_to_half_of_its_budget(remaining: list[int], shares: list[int]) -> None:
    assert share_step(remaining, remaining, 2048) == shares


def test_what_is_left_of_a_long_prompt_does_not_pass_for_a_short_one() -> None:
    assert share_step([1500, 300], [100, 300], 2048) == [100, 300]
    assert share_step([8000, 1000, 1000], [600, 1000, 1000], 2048) == [512, 1000, 0]


def prompt(number: int, num_tokens: int) -> PromptState:
    """One whose blocks are like no other's."""
    return PromptState([number, *range(1, num_tokens)])


def drain(batcher: PrefillBatcher) -> None:
    while chunks := batcher.schedule():
        batcher.complete(chunks)


def test_a_short_prompt_passes_a_long_one_that_waits_for_blocks() -> None:
    batcher = PrefillBatcher(BlockAllocator(64, BLOCK_TOKENS), BatcherLimits(token_budget=128))
    running, waiting, short = prompt(0, 50 * BLOCK_TOKENS), prompt(1, 40 * BLOCK_TOKENS), prompt(2, 20)
    for each in (running, waiting, short):
        batcher.submit(each)
    assert batcher.admit() == [running, short]


def test_a_long_prompt_leaves_blocks_to_short_ones_unless_nothing_else_runs() -> None:
    batcher = PrefillBatcher(BlockAllocator(64, BLOCK_TOKENS), BatcherLimits(token_budget=128))
    first, second = prompt(0, 30 * BLOCK_TOKENS), prompt(1, 30 * BLOCK_TOKENS)
    batcher.submit(first)
    batcher.submit(second)
    assert batcher.admit() == [first], "64 - 30 - 30 is less than an eighth of 64"
    drain(batcher)
    assert batcher.admit() == [second], "the first one's blocks are held by its ticket, and nothing else runs"


def test_a_long_prompt_is_passed_by_so_many_tokens_and_no_more() -> None:
    allocator = BlockAllocator(64, BLOCK_TOKENS, prefix_cache=False)
    batcher = PrefillBatcher(allocator, BatcherLimits(token_budget=128, max_prompts=1000))
    first, patient = prompt(0, 50 * BLOCK_TOKENS), prompt(1, 20 * BLOCK_TOKENS)
    batcher.submit(first)
    batcher.submit(patient)
    batcher.admit()
    passed = 0
    for number in range(200):
        short = prompt(2 + number, 4 * BLOCK_TOKENS)
        batcher.submit(short)
        if not batcher.admit():
            break
        passed += short.num_tokens
        while not short.complete:
            batcher.complete(batcher.schedule())
        batcher.close(short)
    assert passed == PATIENCE * patient.num_tokens
    batcher.close(first)
    assert batcher.admit()[0] is patient


def test_tokens_are_bounded_for_long_prompts_and_the_answer_says_when_to_come_back() -> None:
    limits = BatcherLimits(token_budget=128, max_prompts=4, max_queued_tokens=1000)
    batcher = PrefillBatcher(BlockAllocator(256, BLOCK_TOKENS), limits)
    batcher.submit(prompt(0, 900))
    with pytest.raises(TandemError) as caught:
        batcher.submit(prompt(1, 600), tokens_per_second=250.0)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s == pytest.approx(2.0)
    for number in range(3):
        batcher.submit(prompt(2 + number, 40))
    with pytest.raises(TandemError) as caught:
        batcher.submit(prompt(5, 40), tokens_per_second=250.0)
    assert caught.value.retry_after_s == pytest.approx(1020 / 4 / 250, abs=0.01)


def test_one_prompt_longer_than_the_bound_is_served_alone() -> None:
    batcher = PrefillBatcher(BlockAllocator(256, BLOCK_TOKENS), BatcherLimits(token_budget=128, max_queued_tokens=1000))
    batcher.submit(prompt(0, 2000))
    assert batcher.admit()


Arrival = tuple[float, int]


def cpu_step_s(num_tokens: int) -> float:
    return 0.002 + 0.0006 * num_tokens


def gpu_step_s(num_tokens: int) -> float:
    """As measured on an H100; below some 500 tokens the host is the slower one."""
    return max(0.012, 0.0004 + 0.000_023 * num_tokens)


def replay(
    arrivals: Sequence[Arrival], limit_s: float = 1000.0, step_s: Callable[[int], float] = cpu_step_s, token_budget: int = 512
) -> list[tuple[int, float]]:
    """(tokens, seconds to the first token) of each prompt."""
    limits = BatcherLimits(token_budget, max_prompts=10_000, max_queued_tokens=10**9)
    batcher = PrefillBatcher(BlockAllocator(2048, BLOCK_TOKENS, prefix_cache=False), limits)
    todo, since, answers, now = list(arrivals), dict[PromptState, float](), list[tuple[int, float]](), 0.0
    heapq.heapify(todo)
    while (todo or batcher.num_prompts) and now < limit_s:
        while todo and todo[0][0] <= now:
            moment, num_tokens = heapq.heappop(todo)
            arrived = prompt(len(since), num_tokens)
            since[arrived] = moment
            batcher.submit(arrived)
        batcher.admit()
        chunks = batcher.schedule()
        if not chunks:
            now = todo[0][0]
            continue
        now += step_s(sum(chunk.num_tokens for chunk in chunks))
        batcher.complete(chunks)
        for done in (chunk.prompt for chunk in chunks if chunk.prompt.complete):
            answers.append((done.num_tokens, now - since[done]))
            batcher.close(done)
    assert not batcher.num_prompts, "prompts were left over"
    return answers


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@pytest.mark.parametrize("seed", range(5))
def test_a_flood_of_long_prompts_costs_short_ones_less_than_three_times_the_quiet_time(seed: int) -> None:
    dice = random.Random(seed)
    moments, moment = list[float](), 0.0
    for _ in range(1000):
        moment += dice.expovariate(3.0)
        moments.append(moment)
    shorts = [(moment, dice.randint(100, 250)) for moment in moments]
    flood = [(dice.uniform(0.0, moments[-1] * 0.3), dice.randint(2000, 4000)) for _ in range(120)]
    quiet = p99([seconds for _, seconds in replay(shorts)])
    answers = replay(shorts + flood)
    flooded = p99([seconds for num_tokens, seconds in answers if num_tokens <= 250])
    assert flooded <= 3 * quiet, (flooded, quiet)
    assert len(answers) == len(shorts) + len(flood), "long prompts are served, too"


@pytest.mark.parametrize("num_tokens", [1024, 1025])
def test_prompts_that_fill_the_device_are_computed_one_at_a_time(num_tokens: int) -> None:
    """So that none waits for its neighbour: no schedule of equal prompts, known only as they come, has the lower mean."""
    dice, moment, moments = random.Random(1), 0.0, list[float]()
    for _ in range(2000):
        moment += dice.expovariate(30.0)
        moments.append(moment)
    answers = replay([(moment, num_tokens) for moment in moments], step_s=gpu_step_s, token_budget=2048)
    free_at, ideal = 0.0, list[float]()
    for moment in moments:
        free_at = max(free_at, moment) + gpu_step_s(num_tokens)
        ideal.append(free_at - moment)
    assert statistics.mean(seconds for _, seconds in answers) == pytest.approx(statistics.mean(ideal), rel=1e-6)

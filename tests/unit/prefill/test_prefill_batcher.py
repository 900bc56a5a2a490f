"""The prefill batcher: order, budget, chunking, and who holds which block when."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm.kv.allocator import BlockAllocator
from prefill_svc.batcher import BatcherLimits, Chunk, PrefillBatcher, PromptState
from tandem.errors import Reason, TandemError

BLOCK_TOKENS = 4


def make(num_blocks: int = 16, token_budget: int = 8, max_prompts: int = 8) -> tuple[PrefillBatcher, BlockAllocator]:
    allocator = BlockAllocator(num_blocks, BLOCK_TOKENS)
    return PrefillBatcher(allocator, BatcherLimits(token_budget, max_prompts)), allocator


def submit(batcher: PrefillBatcher, num_tokens: int, first_token: int = 0) -> PromptState:
    prompt = PromptState(list(range(first_token, first_token + num_tokens)))
    batcher.submit(prompt)
    batcher.admit()
    return prompt


def step(batcher: PrefillBatcher) -> list[tuple[PromptState, int, int]]:
    chunks = batcher.schedule()
    batcher.complete(chunks)
    return [(chunk.prompt, chunk.start, chunk.num_tokens) for chunk in chunks]


def test_prompts_are_packed_in_order_of_arrival_to_half_of_the_budget() -> None:
    batcher, _ = make(token_budget=16)
    first, second, third = submit(batcher, 3, 100), submit(batcher, 4, 200), submit(batcher, 4, 300)
    assert step(batcher) == [(first, 0, 3), (second, 0, 4)]
    assert step(batcher) == [(third, 0, 4)]
    assert step(batcher) == []


def test_a_long_prompt_is_chunked() -> None:
    batcher, _ = make(token_budget=8)
    prompt = submit(batcher, 20)
    assert [step(batcher)[0][1:] for _ in range(3)] == [(0, 8), (8, 8), (16, 4)]
    assert prompt.complete


def test_a_repeated_prompt_computes_only_what_is_not_cached() -> None:
    batcher, _ = make()
    first = submit(batcher, 10)
    while step(batcher):
        pass
    batcher.close(first)
    again = submit(batcher, 10)
    assert again.num_cached_tokens == 8
    assert step(batcher) == [(again, 8, 2)]


def test_a_prompt_waits_for_blocks_and_nobody_of_its_kind_overtakes_it() -> None:
    batcher, allocator = make(num_blocks=5)
    first = submit(batcher, 12, 100)
    big, small = submit(batcher, 12, 200), submit(batcher, 5, 300)
    assert (batcher.num_running, batcher.num_waiting, allocator.num_free) == (1, 2, 2)
    while step(batcher):
        pass
    batcher.close(first)
    assert batcher.admit() == [big, small]


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    batcher, _ = make(num_blocks=2)
    with pytest.raises(TandemError) as caught:
        batcher.submit(PromptState(list(range(9))))
    assert caught.value.reason is Reason.POOL_TOO_SMALL
    assert caught.value.retry_after_s is None


def test_too_many_prompts_are_refused() -> None:
    batcher, _ = make(max_prompts=1)
    submit(batcher, 2)
    with pytest.raises(TandemError) as caught:
        batcher.submit(PromptState([1]))
    assert caught.value.reason is Reason.QUEUE_FULL


def test_closing_in_the_middle_of_a_step_keeps_the_blocks_until_the_step_ends() -> None:
    batcher, allocator = make(num_blocks=2)
    prompt = submit(batcher, 8)
    chunks = batcher.schedule()
    batcher.close(prompt)
    assert allocator.num_free == 0
    batcher.complete(chunks)
    assert allocator.num_free == 2


@pytest.mark.parametrize(
    ("sizes", "settled"), [([], False), ([3], False), ([8], True), ([5, 5], True), ([3, 4], False), ([20], False), ([8, 20], False)]
)
def test_a_step_is_settled_where_nobody_who_comes_could_join_it(sizes: list[int], settled: bool) -> None:
    batcher, _ = make(num_blocks=64, token_budget=16)
    for number, size in enumerate(sizes):
        submit(batcher, size, 100 * number)
    assert batcher.settled == settled
    before = [(chunk.prompt, chunk.num_tokens) for chunk in batcher._pack()]
    submit(batcher, 2, 1000)
    if settled:
        assert [(chunk.prompt, chunk.num_tokens) for chunk in batcher._pack()] == before


def test_a_chunk_costs_nothing_per_block_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, allocator = make(num_blocks=32)
    submit(batcher, 100)
    touched: list[object] = []
    for name in ("share", "free"):
        monkeypatch.setattr(allocator, name, touched.append)
    assert len(step(batcher)) == 1
    assert touched == []


class PrefillBatcherMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, cancels and releases of shared blocks conserves blocks and loses no prompt.

    Up to two steps are in flight, and no block that they use is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batcher, self.allocator = make(num_blocks=12, token_budget=6, max_prompts=5)
        self.prompts: list[PromptState] = []
        self.flights: list[tuple[list[Chunk], list[int]]] = []
        self.tickets: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40))
    def arrive(self, tokens: list[int]) -> None:
        prompt = PromptState(tokens)
        try:
            self.batcher.submit(prompt)
        except TandemError:
            return
        self.prompts.append(prompt)

    @rule()
    def admit(self) -> None:
        for prompt in self.batcher.admit():
            self.allocator.share(prompt.block_ids)
            self.tickets.append(prompt.block_ids)

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def begin_step(self) -> None:
        chunks = self.batcher.schedule()
        assert sum(chunk.num_tokens for chunk in chunks) <= 6
        for chunk in chunks:
            before = sum(c.num_tokens for flight, _ in self.flights for c in flight if c.prompt is chunk.prompt)
            assert chunk.start == chunk.prompt.num_computed_tokens + before
        if chunks:
            self.flights.append((chunks, [block for chunk in chunks for block in chunk.prompt.block_ids]))

    @precondition(lambda self: self.flights)
    @rule()
    def end_step(self) -> None:
        chunks, _ = self.flights.pop(0)
        self.batcher.complete(chunks)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(self.prompts))
        self.prompts.remove(prompt)
        self.batcher.close(prompt)
        self.batcher.close(prompt)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release_ticket(self, data: st.DataObject) -> None:
        self.allocator.free(self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1))))

    @invariant()
    def books_balance(self) -> None:
        self.allocator.check_integrity()
        for _, blocks in self.flights:
            assert all(self.allocator._references[block] for block in blocks), "a step in flight uses a free block"

    def teardown(self) -> None:
        while self.flights:
            self.end_step()
        for prompt in self.prompts:
            self.batcher.close(prompt)
        for blocks in self.tickets:
            self.allocator.free(blocks)
        assert self.allocator.num_free == self.allocator.num_blocks
        assert self.batcher.num_prompts == self.batcher.num_queued_tokens == 0


TestPrefillBatcherMachine = PrefillBatcherMachine.TestCase
TestPrefillBatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

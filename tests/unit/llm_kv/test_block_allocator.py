"""The block allocator, against a model of it that is too simple to be wrong."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llm.kv.allocator import BlockAllocator, OutOfBlocksError

BLOCK_TOKENS = 2
NUM_BLOCKS = 10


def test_a_failed_allocation_changes_nothing() -> None:
    allocator = BlockAllocator(4, BLOCK_TOKENS)
    held = allocator.allocate(3)
    with pytest.raises(OutOfBlocksError) as caught:
        allocator.allocate(2)
    assert (caught.value.needed, caught.value.free, allocator.num_free) == (2, 1, 1)
    allocator.free(held)
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


def test_a_prompt_too_long_takes_no_reference_to_its_cached_blocks() -> None:
    allocator = BlockAllocator(4, BLOCK_TOKENS)
    first = allocator.allocate_prompt([1, 2, 3, 4])
    allocator.commit([1, 2, 3, 4], first.block_ids, 4)
    allocator.free(first.block_ids)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate_prompt([1, 2, 3, 4, *range(10, 16)])
    assert allocator.num_free == 4
    allocator.check_integrity()


def test_the_last_token_is_always_computed() -> None:
    allocator = BlockAllocator(8, BLOCK_TOKENS)
    tokens = [1, 2, 3, 4]
    first = allocator.allocate_prompt(tokens)
    allocator.commit(tokens, first.block_ids, 4)
    assert allocator.allocate_prompt(tokens).num_cached_tokens == 2
    assert allocator.allocate_prompt([*tokens, 5]).num_cached_tokens == 4


def test_only_computed_full_blocks_are_found() -> None:
    allocator = BlockAllocator(8, BLOCK_TOKENS)
    tokens = [1, 2, 3, 4, 5]
    first = allocator.allocate_prompt(tokens)
    allocator.commit(tokens, first.block_ids, 3)
    again = allocator.allocate_prompt(tokens)
    assert (again.num_cached_tokens, again.block_ids[0]) == (2, first.block_ids[0])
    assert again.block_ids[1] not in first.block_ids


def test_equal_tokens_after_another_beginning_are_another_block() -> None:
    allocator = BlockAllocator(8, BLOCK_TOKENS)
    first = allocator.allocate_prompt([1, 2, 3, 4])
    allocator.commit([1, 2, 3, 4], first.block_ids, 4)
    assert allocator.allocate_prompt([9, 9, 3, 4, 5]).num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_found() -> None:
    allocator = BlockAllocator(8, BLOCK_TOKENS, prefix_cache=False)
    first = allocator.allocate_prompt([1, 2, 3])
    allocator.commit([1, 2, 3], first.block_ids, 3)
    assert allocator.allocate_prompt([1, 2, 3]).num_cached_tokens == 0


def test_use_cache_off_bypasses_it_for_one_prompt() -> None:
    allocator = BlockAllocator(8, BLOCK_TOKENS)
    first = allocator.allocate_prompt([1, 2, 3])
    allocator.commit([1, 2, 3], first.block_ids, 3)
    assert allocator.allocate_prompt([1, 2, 3], use_cache=False).num_cached_tokens == 0


def test_a_chain_is_given_up_from_its_end() -> None:
    allocator = BlockAllocator(4, BLOCK_TOKENS)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first = allocator.allocate_prompt(tokens)
    allocator.commit(tokens, first.block_ids, 8)
    allocator.free(first.block_ids)
    held = allocator.allocate(1)
    assert held == [first.block_ids[3]]


def test_freeing_twice_is_our_bug() -> None:
    allocator = BlockAllocator(2, BLOCK_TOKENS)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError):
        allocator.free(blocks)
    with pytest.raises(AssertionError):
        allocator.share(blocks)


class AllocatorMachine(RuleBasedStateMachine):
    """`content` is what a block's memory holds: written when a prompt is computed, lost when the block is handed out anew.

    A cached block that is handed to a prompt must hold the prompt's own tokens, with all that came before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS, BLOCK_TOKENS)
        self.held: list[tuple[list[int], tuple[int, ...]]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.allocator.num_free
        try:
            blocks = self.allocator.allocate(count)
        except OutOfBlocksError:
            assert count > free
            return
        self._take_over([], tuple(blocks), 0)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=9), use_cache=st.booleans())
    def allocate_prompt(self, tokens: list[int], use_cache: bool) -> None:
        free = self.allocator.num_free
        try:
            prompt = self.allocator.allocate_prompt(tokens, use_cache=use_cache)
        except OutOfBlocksError:
            assert self.allocator.num_free == free
            return
        assert len(prompt.block_ids) == -(-len(tokens) // BLOCK_TOKENS)
        assert prompt.num_cached_tokens % BLOCK_TOKENS == 0 and prompt.num_cached_tokens < max(1, len(tokens))
        num_cached = prompt.num_cached_tokens // BLOCK_TOKENS
        for index, block in enumerate(prompt.block_ids[:num_cached]):
            assert self.content[block] == tuple(tokens[: (index + 1) * BLOCK_TOKENS])
        self._take_over(tokens, prompt.block_ids, num_cached)

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        if not self.held:
            return
        tokens, blocks = data.draw(st.sampled_from(self.held))
        computed = data.draw(st.integers(0, len(tokens)))
        for index in range(computed // BLOCK_TOKENS):
            self.content[blocks[index]] = tuple(tokens[: (index + 1) * BLOCK_TOKENS])
        self.allocator.commit(tokens, blocks, computed)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.held:
            holding = data.draw(st.sampled_from(self.held))
            self.allocator.share(holding[1])
            self.held.append(holding)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            index = data.draw(st.integers(0, len(self.held) - 1))
            self.allocator.free(self.held.pop(index)[1])

    @invariant()
    def blocks_are_conserved(self) -> None:
        references = Counter(block for _, blocks in self.held for block in blocks)
        assert self.allocator.num_free == NUM_BLOCKS - len(references)
        self.allocator.check_integrity()

    def _take_over(self, tokens: list[int], blocks: tuple[int, ...], num_cached: int) -> None:
        in_use = {block for _, other in self.held for block in other}
        assert len(set(blocks)) == len(blocks)
        assert in_use.isdisjoint(blocks[num_cached:]), "a block in use was handed out as new"
        for block in blocks[num_cached:]:
            self.content.pop(block, None)
        self.held.append((tokens, blocks))

    def teardown(self) -> None:
        for _, blocks in self.held:
            self.allocator.free(blocks)
        assert self.allocator.num_free == NUM_BLOCKS


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_blocks_are_announced_before_their_content_may_change_and_only_then() -> None:
    """Blocks that the prefix cache hands on are not: others read them by their tickets."""
    handed_out: list[int] = []
    allocator = BlockAllocator(4, BLOCK_TOKENS, True, handed_out.append)
    tokens = list(range(BLOCK_TOKENS + 1))
    first = allocator.allocate_prompt(tokens)
    assert sorted(handed_out) == sorted(first.block_ids)
    allocator.commit(tokens, first.block_ids, len(tokens))
    allocator.free(first.block_ids)
    handed_out.clear()
    second = allocator.allocate_prompt(tokens)
    assert handed_out == [second.block_ids[1]] and second.block_ids[0] == first.block_ids[0]
    allocator.free(second.block_ids)
    handed_out.clear()
    allocator.allocate(4)
    assert sorted(handed_out) == [0, 1, 2, 3]

"""The decode batcher: reservation, growth, preemption, and who holds which block when."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_svc.batcher import BatcherLimits, DecodeBatcher, Run, SequenceState, Stage
from llm.kv.allocator import BlockAllocator
from tandem.errors import Reason, TandemError

BLOCK_TOKENS = 4


def make(num_blocks: int = 16, **limits: int) -> tuple[DecodeBatcher, BlockAllocator]:
    allocator = BlockAllocator(num_blocks, BLOCK_TOKENS, prefix_cache=False)
    return DecodeBatcher(allocator, BatcherLimits(**limits)), allocator


def join(batcher: DecodeBatcher, num_tokens: int, max_total: int = 24) -> SequenceState:
    """A sequence whose prompt has been pulled and whose first token is known."""
    sequence = SequenceState([1] * num_tokens, max_total_tokens=max_total)
    batcher.reserve(sequence)
    batcher.activate(sequence, num_tokens)
    sequence.token_ids.append(2)
    return sequence


def step(batcher: DecodeBatcher) -> list[SequenceState]:
    """One step in which every sequence that can draws a token; returns those that drew."""
    runs = batcher.schedule()
    batcher.complete(runs)
    drew = [run.sequence for run in runs if run.draws]
    for sequence in drew:
        sequence.token_ids.append(3)
    return drew


def test_sequences_join_and_leave_between_steps() -> None:
    batcher, allocator = make()
    first = join(batcher, 5)
    assert step(batcher) == [first]
    second = join(batcher, 2)
    assert step(batcher) == [first, second]
    batcher.close(first)
    assert step(batcher) == [second]
    batcher.close(second)
    assert allocator.num_free == allocator.num_blocks


def test_a_sequence_takes_a_block_only_when_it_grows_into_it() -> None:
    batcher, _ = make()
    sequence = join(batcher, 3)
    assert len(sequence.block_ids) == 1
    step(batcher)
    assert (sequence.num_tokens, len(sequence.block_ids)) == (5, 1)
    step(batcher)
    assert len(sequence.block_ids) == 2


def test_a_reservation_without_room_is_refused_at_once() -> None:
    batcher, _ = make(num_blocks=3)
    join(batcher, 8, max_total=12)
    with pytest.raises(TandemError) as caught:
        join(batcher, 2, max_total=4)
    assert caught.value.reason is Reason.KV_BLOCKS_EXHAUSTED
    assert caught.value.retry_after_s is not None


def test_a_refusal_says_when_the_next_sequence_ends_at_the_latest() -> None:
    batcher, _ = make(num_blocks=4)
    for max_total in (13, 9):
        join(batcher, 4, max_total=max_total)
    for speed, retry_after_s in ((10.0, 2 * 4 / 10.0), (0.01, 5.0), (1e9, 0.05), (0.0, 1.0)):
        with pytest.raises(TandemError) as caught:
            batcher.reserve(SequenceState([1, 2], max_total_tokens=4), speed)
        assert caught.value.retry_after_s == pytest.approx(retry_after_s)


def test_what_never_fits_is_refused() -> None:
    batcher, _ = make(num_blocks=3)
    with pytest.raises(TandemError) as caught:
        batcher.reserve(SequenceState([1], max_total_tokens=13))
    assert caught.value.reason is Reason.POOL_TOO_SMALL
    assert caught.value.retry_after_s is None


def test_the_youngest_gives_way_and_is_computed_again_in_chunks() -> None:
    batcher, allocator = make(num_blocks=4, recompute_budget=2)
    old, young = join(batcher, 7, max_total=16), join(batcher, 6, max_total=16)
    assert allocator.num_free == 0
    assert step(batcher) == [old, young]
    assert step(batcher) == [old]  # needs a third block, which is taken from the younger
    assert (young.stage, young.num_preemptions) == (Stage.PREEMPTED, 1)
    batcher.close(old)
    assert step(batcher) == []  # 3 of the 8 tokens
    assert young.num_scheduled_tokens == 3
    while not step(batcher):
        pass
    assert young.num_scheduled_tokens == 8


def test_new_reservations_leave_room_for_the_preempted() -> None:
    batcher, _ = make(num_blocks=4)
    old, young = join(batcher, 7, max_total=16), join(batcher, 6, max_total=16)
    step(batcher)
    step(batcher)
    assert young.stage is Stage.PREEMPTED
    with pytest.raises(TandemError):
        join(batcher, 1, max_total=4)
    batcher.close(old)
    assert step(batcher) == [young]


def test_closing_in_the_middle_of_a_step_keeps_the_blocks_until_the_step_ends() -> None:
    batcher, allocator = make()
    sequence = join(batcher, 6)
    runs = batcher.schedule()
    batcher.close(sequence)
    assert allocator.num_free == allocator.num_blocks - 2
    batcher.complete(runs)
    assert allocator.num_free == allocator.num_blocks


def test_a_step_costs_nothing_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 64 sequences of 8,192 tokens spend longer on references to their 32,768 blocks than on the rest of the step."""
    batcher, allocator = make(num_blocks=64)
    sequences = [join(batcher, 41, max_total=64) for _ in range(4)]
    touched: list[object] = []
    for name in ("share", "free", "allocate"):
        monkeypatch.setattr(allocator, name, touched.append)
    assert step(batcher) == sequences
    assert touched == []


def test_a_step_follows_one_whose_tokens_nobody_knows_yet() -> None:
    batcher, _ = make()
    sequence = join(batcher, 3)
    first, second = batcher.schedule(), batcher.schedule()
    assert [(run.start, run.num_tokens, run.draws) for run in (*first, *second)] == [(3, 1, True), (4, 1, True)]
    assert len(sequence.block_ids) == 2, "room for a token that is being drawn"
    batcher.complete(first)
    sequence.token_ids.append(3)
    (third,) = batcher.schedule()
    assert (third.start, sequence.num_tokens) == (5, 7)


def test_nothing_is_scheduled_beyond_the_last_token() -> None:
    batcher, _ = make()
    sequence = join(batcher, 3, max_total=6)
    first, second = batcher.schedule(), batcher.schedule()
    assert first and second and not batcher.schedule(), "its sixth token is being drawn"
    batcher.close(sequence)


def test_a_sequence_that_ends_late_keeps_its_blocks_until_its_superfluous_step_ends() -> None:
    batcher, allocator = make()
    sequence = join(batcher, 6)
    first, second = batcher.schedule(), batcher.schedule()
    batcher.complete(first)
    batcher.close(sequence)
    assert allocator.num_free == allocator.num_blocks - 2
    batcher.complete(second)
    assert allocator.num_free == allocator.num_blocks


def test_nobody_gives_way_while_a_step_writes_to_the_blocks() -> None:
    batcher, _ = make(num_blocks=4)
    old, young = join(batcher, 7, max_total=16), join(batcher, 6, max_total=16)
    first = batcher.schedule()
    second = batcher.schedule()
    assert [run.sequence for run in second] == [young], "the older needs a block and goes without"
    assert young.stage is Stage.ACTIVE
    batcher.complete(first)
    old.token_ids.append(3)
    young.token_ids.append(3)
    assert batcher.schedule() == [], "nothing more until it can have one"
    batcher.complete(second)
    young.token_ids.append(3)
    assert [run.sequence for run in batcher.schedule()] == [old]
    assert young.stage is Stage.PREEMPTED


def expect(batcher: DecodeBatcher, num_tokens: int, max_total: int = 24) -> SequenceState:
    """A sequence whose prompt is being copied and whose first token is known."""
    sequence = SequenceState([1] * num_tokens, max_total_tokens=max_total)
    batcher.reserve(sequence)
    batcher.expect(sequence, num_tokens)
    sequence.token_ids.append(2)
    return sequence


@pytest.mark.parametrize("verified", ["in flight", "landed"])
def test_an_arriving_sequence_takes_part_in_one_step_until_it_is_verified(verified: str) -> None:
    batcher, _ = make()
    other, sequence = join(batcher, 5), expect(batcher, 3)
    first, second = batcher.schedule(), batcher.schedule()
    assert [[run.sequence for run in runs] for runs in (first, second)] == [[other, sequence], [other]]
    if verified == "in flight":
        batcher.verified(sequence)
    batcher.complete(first)
    other.token_ids.append(3)
    if verified == "landed":
        assert [run.sequence for run in batcher.schedule()] == [other]
        batcher.verified(sequence)
    sequence.token_ids.append(3)
    assert [(run.start, run.num_tokens) for run in batcher.schedule() if run.sequence is sequence] == [(4, 1)]


def test_an_arriving_sequence_neither_gives_way_nor_expires() -> None:
    batcher, _ = make(num_blocks=4)
    old, arriving = join(batcher, 7, max_total=16), expect(batcher, 6, max_total=16)
    arriving.deadline = 1.0
    batcher.complete(batcher.schedule())
    old.token_ids.append(3)
    assert batcher.schedule() == [], "the older needs a block, and has to put itself back"
    assert (old.stage, arriving.stage) == (Stage.PREEMPTED, Stage.ARRIVING)
    assert batcher.expired(2.0) == [] and batcher.num_pulling == 1
    batcher.verified(arriving)
    assert batcher.expired(2.0) == [arriving]


@pytest.mark.parametrize("flying", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_a_withdrawn_sequences_blocks_are_anothers_and_its_steps(flying: bool, closed: bool) -> None:
    batcher, allocator = make()
    sequence = expect(batcher, 6)
    blocks, runs = list(sequence.block_ids), batcher.schedule() if flying else []
    other = batcher.withdraw(sequence)
    assert (sequence.stage, other.stage) == (Stage.CLOSED, Stage.PULLING)
    assert (list(other.block_ids), other.token_ids) == (blocks, [1] * 6)
    if flying:
        assert list(sequence.block_ids) == blocks, "the step has yet to be launched"
    if closed:
        batcher.close(other)
        assert (allocator.num_free == allocator.num_blocks) == (not flying)
    batcher.complete(runs)
    assert allocator.num_free == allocator.num_blocks - (0 if closed else 2)
    allocator.check_integrity()


class DecodeBatcherMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps and cancels conserves blocks, never starves and never loses a token.

    Up to two steps are in flight, and a block that one of them uses belongs to nobody else. Some take part in a step before their
    KV is verified, and some of those are withdrawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batcher, self.allocator = make(num_blocks=8, max_batch=3, max_sequences=6, recompute_budget=5)
        self.sequences: list[SequenceState] = []
        self.flights: list[tuple[list[Run], list[int]]] = []
        self.held: set[SequenceState] = set()

    @rule(num_tokens=st.integers(1, 12), more=st.integers(1, 24))
    def arrive(self, num_tokens: int, more: int) -> None:
        sequence = SequenceState([1] * num_tokens, max_total_tokens=num_tokens + more)
        try:
            self.batcher.reserve(sequence)
        except TandemError:
            return
        self.sequences.append(sequence)

    @precondition(lambda self: any(s.stage is Stage.PULLING for s in self.sequences))
    @rule()
    def pulled(self) -> None:
        sequence = next(s for s in self.sequences if s.stage is Stage.PULLING)
        self.batcher.activate(sequence, sequence.num_tokens)
        sequence.token_ids.append(2)

    @precondition(lambda self: any(s.stage is Stage.PULLING and s.num_tokens + 1 < s.max_total_tokens for s in self.sequences))
    @rule()
    def coming(self) -> None:
        sequence = next(s for s in self.sequences if s.stage is Stage.PULLING and s.num_tokens + 1 < s.max_total_tokens)
        self.batcher.expect(sequence, sequence.num_tokens)
        sequence.token_ids.append(2)

    @precondition(lambda self: any(s.stage is Stage.ARRIVING for s in self.sequences))
    @rule(good=st.booleans())
    def known(self, good: bool) -> None:
        sequence = next(s for s in self.sequences if s.stage is Stage.ARRIVING)
        num_steps = (sequence in self.held) + sequence.num_flights
        assert num_steps <= 1, "more than one step of what nobody has verified"
        if good:
            self.batcher.verified(sequence)
            sequence.token_ids.extend([3] * (sequence in self.held))
        else:
            self.sequences[self.sequences.index(sequence)] = other = self.batcher.withdraw(sequence)
            assert other.token_ids == sequence.token_ids[:-1]
        self.held.discard(sequence)

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def begin_step(self) -> None:
        runs = self.batcher.schedule()
        assert len(runs) <= 3
        for run in runs:
            assert len(run.sequence.block_ids) * BLOCK_TOKENS >= run.start + run.num_tokens
            assert run.sequence.num_tokens <= run.sequence.max_total_tokens + 1
        new = [s for s in self.sequences if s.stage is Stage.ARRIVING and s not in self.held]
        active = [s for s in self.sequences if s.stage is Stage.ACTIVE] + new
        assert self.flights or bool(runs) == bool(active), "an active sequence, and nothing to do"
        if runs:
            self.flights.append((runs, [block for run in runs for block in run.sequence.block_ids]))

    @precondition(lambda self: self.flights)
    @rule()
    def end_step(self) -> None:
        runs, _ = self.flights.pop(0)
        self.batcher.complete(runs)
        for run in runs:
            sequence = run.sequence
            if run.draws and sequence.stage is Stage.ACTIVE:
                sequence.token_ids.append(3)
                if len(sequence.token_ids) >= sequence.max_total_tokens:
                    self.close(sequence)
            elif sequence.stage is Stage.ARRIVING:
                self.held.add(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.close(data.draw(st.sampled_from(self.sequences)))

    def close(self, sequence: SequenceState) -> None:
        self.sequences.remove(sequence)
        self.batcher.close(sequence)
        self.batcher.close(sequence)

    @invariant()
    def books_balance(self) -> None:
        self.allocator.check_integrity()
        for _, blocks in self.flights:
            assert all(self.allocator._references[block] >= 1 for block in blocks), "a step in flight uses a free block"
        owned = [block for sequence in self.sequences for block in sequence.block_ids]
        owned += {block for _, blocks in self.flights for block in blocks} - set(owned)
        assert len(owned) == len(set(owned)) <= 8 - self.allocator.num_free

    def teardown(self) -> None:
        """Everybody's KV arrives, nobody else comes: everyone must finish, in a bounded number of steps."""
        while self.flights:
            self.end_step()
        while any(s.stage is Stage.ARRIVING for s in self.sequences):
            self.known(good=True)
        while any(s.stage is Stage.PULLING for s in self.sequences):
            self.pulled()
        for sequence in list(self.sequences):
            if sequence.num_tokens >= sequence.max_total_tokens:
                self.close(sequence)
        steps = 0
        while self.sequences:
            self.begin_step()
            self.begin_step()
            while self.flights:
                self.end_step()
            steps += 1
            assert steps < 1000, "no progress"
        assert self.allocator.num_free == self.allocator.num_blocks


TestDecodeBatcherMachine = DecodeBatcherMachine.TestCase
TestDecodeBatcherMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)

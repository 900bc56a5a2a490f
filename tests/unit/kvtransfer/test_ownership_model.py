"""The whole of a block's ownership as one model: allocator, generations, ledger, and consumers that read at their own pace.

Time passes in steps of any length, consumers freeze in the middle of a copy, blocks are reused as fast as they are freed. What a
consumer takes in must be what its ticket was granted for, and every block must always be somewhere.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.ledger import Entry, TicketLedger
from kvtransfer.pull_state import PulledTickets, PullState
from kvtransfer.states import State
from llm.kv.allocator import BlockAllocator, OutOfBlocksError
from tandem.errors import Reason, TandemError

NUM_BLOCKS, BLOCK_TOKENS, LEASE_S = 4, 2, 5.0
NUM_EXAMPLES, NUM_STEPS = 200, 60
GONE = TandemError(Reason.CANCELLED, "the prefill was cancelled")


@dataclass(eq=False)
class Request:
    """A prompt at the producer: its tokens, the ticket for its blocks, and what the fence had for them at the grant."""

    tokens: tuple[int, ...]
    entry: Entry
    generations: list[int]
    held: bool = True
    """Whether the producer's own request still holds its reference."""


@dataclass(eq=False)
class Consumer:
    """A pull, which copies a block in two steps."""

    request: Request
    state: PullState
    open: bool = True
    copying: tuple[int, object] | None = None
    taken_in: list[object] = field(default_factory=list)


class OwnershipMachine(RuleBasedStateMachine):
    """What a block holds is modelled by a stamp: the tokens up to its end, which is all that its KV depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.content: list[object] = [None] * NUM_BLOCKS
        self.generations = [0] * NUM_BLOCKS
        self.allocator = BlockAllocator(NUM_BLOCKS, BLOCK_TOKENS, True, self._hand_out)
        self.ledger = TicketLedger(lambda: self.now, LEASE_S, self.allocator.free)
        self.requests: list[Request] = []
        self.consumers: list[Consumer] = []
        self.pulled = PulledTickets(lambda: self.now)

    def _hand_out(self, block: int) -> None:
        self.generations[block] += 1

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6), at_once=st.sampled_from([True, True, False]))
    def admit(self, tokens: list[int], at_once: bool) -> None:
        try:
            blocks = self.allocator.allocate_prompt(tokens).block_ids
        except OutOfBlocksError:
            return
        self.allocator.share(blocks)
        entry = self.ledger.grant(f"t{len(self.requests)}", 1, blocks)
        self.requests.append(Request(tuple(tokens), entry, [self.generations[block] for block in blocks]))
        if at_once:
            self._compute(self.requests[-1], len(blocks))

    @precondition(lambda self: any(each.held for each in self.requests))
    @rule(data=st.data(), count=st.integers(1, 3))
    def compute(self, data: st.DataObject, count: int) -> None:
        self._compute(data.draw(st.sampled_from([each for each in self.requests if each.held])), count)

    def _compute(self, request: Request, count: int) -> None:
        entry = request.entry
        ready = min(len(entry.block_ids), entry.num_ready_blocks + count)
        for index in range(ready):
            self.content[entry.block_ids[index]] = stamp(request.tokens, index)
        self.allocator.commit(request.tokens, entry.block_ids, min(ready * BLOCK_TOKENS, len(request.tokens)))
        self.ledger.progress(entry.ticket_id, ready)
        if ready == len(entry.block_ids):
            self.ledger.finish(entry.ticket_id, 7)
            self._let_go(request)

    @precondition(lambda self: any(each.held for each in self.requests))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([each for each in self.requests if each.held]))
        self.ledger.abort(request.entry.ticket_id, GONE)
        self._let_go(request)

    @precondition(lambda self: any(not each.entry.state.final for each in self.requests))
    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([each for each in self.requests if not each.entry.state.final]))
        entry = request.entry
        self.ledger.open(entry.ticket_id, entry.epoch)
        self.consumers.append(Consumer(request, PullState(entry.ticket_id, 1, len(entry.block_ids), lambda: self.now)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def pull_what_is_no_more(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.requests)).entry
        with pytest.raises(TandemError):
            self.ledger.open(entry.ticket_id, entry.epoch + (not entry.state.final))

    @precondition(lambda self: any(each.open for each in self.consumers))
    @rule(data=st.data(), half_steps=st.integers(1, 5))
    def copy(self, data: st.DataObject, half_steps: int) -> None:
        """Copies begin and end; a consumer that is frozen meanwhile holds what it was told, or has read half."""
        consumer = data.draw(st.sampled_from([each for each in self.consumers if each.open]))
        for _ in range(half_steps):
            if consumer.open:
                self._end_copy(consumer) if consumer.copying is not None else self._begin_copy(consumer)

    def _begin_copy(self, consumer: Consumer) -> None:
        entry = consumer.request.entry
        if (index := consumer.state.num_verified) < entry.num_ready_blocks:
            consumer.state.filling()
            consumer.copying = (index, self.content[entry.block_ids[index]])

    def _end_copy(self, consumer: Consumer) -> None:
        assert consumer.copying is not None
        (index, copied), request = consumer.copying, consumer.request
        consumer.copying = None
        if self.generations[request.entry.block_ids[index]] != request.generations[index]:
            consumer.state.expire()
            self._close(consumer)
            return
        consumer.taken_in.append(copied)
        consumer.state.verified(index, np.ones(1, np.bool_))
        if consumer.state.num_verified == len(request.entry.block_ids):
            consumer.state.ready()
            consumer.state.pulled()
            self.ledger.pulled(request.entry)
            self.pulled.keep(consumer.state, LEASE_S)
            self._close(consumer)

    @precondition(lambda self: any(each.state.state is State.PULLED for each in self.consumers))
    @rule(data=st.data(), lost=st.booleans())
    def release(self, data: st.DataObject, lost: bool) -> None:
        consumer = data.draw(st.sampled_from([each for each in self.consumers if each.state.state is State.PULLED]))
        self.pulled.release(consumer.state.ticket_id, 1)
        if not lost:
            self.ledger.release(consumer.state.ticket_id, 1)

    @precondition(lambda self: sum(each.open for each in self.consumers) > 1)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        consumer = data.draw(st.sampled_from([each for each in self.consumers if each.open]))
        consumer.state.abort()
        self._close(consumer)

    @rule(seconds=st.sampled_from([0.5, 4.9, 5.0, 3600.0]), beat=st.booleans())
    def wait(self, seconds: float, beat: bool) -> None:
        """A wall clock's step cannot be modelled: nothing looks at one."""
        self.now += seconds
        for consumer in self.consumers:
            if beat and consumer.open:
                self.ledger.pulse.beat(consumer.state.ticket_id, 1)
        self.ledger.expire()

    @invariant()
    def what_is_taken_in_is_what_was_granted(self) -> None:
        for consumer in self.consumers:
            expected = [stamp(consumer.request.tokens, index) for index in range(len(consumer.taken_in))]
            assert consumer.taken_in == expected

    @invariant()
    def every_block_is_somewhere(self) -> None:
        self.allocator.check_integrity()
        held = {block for each in self.requests if each.held for block in each.entry.block_ids}
        granted = {block for each in self.requests if not each.entry.state.final for block in each.entry.block_ids}
        assert self.allocator.num_free == NUM_BLOCKS - len(held | granted)

    @invariant()
    def the_ledger_knows_the_live_tickets_and_no_others(self) -> None:
        assert self.ledger.num_outstanding == sum(not each.entry.state.final for each in self.requests)

    def teardown(self) -> None:
        """In the end all is given back, whoever forgot to."""
        for request in self.requests:
            self.ledger.finish(request.entry.ticket_id, 7)
            if request.held:
                self._let_go(request)
        self.now += LEASE_S
        self.ledger.expire()
        assert self.allocator.num_free == NUM_BLOCKS and self.ledger.num_outstanding == 0

    def _let_go(self, request: Request) -> None:
        request.held = False
        self.allocator.free(request.entry.block_ids)

    def _close(self, consumer: Consumer) -> None:
        consumer.open = False
        self.ledger.close(consumer.request.entry)


def stamp(tokens: tuple[int, ...], index: int) -> object:
    return tokens[: (index + 1) * BLOCK_TOKENS]


def test_enough_steps_are_taken() -> None:
    assert NUM_EXAMPLES * NUM_STEPS >= 10_000


TestOwnership = OwnershipMachine.TestCase
TestOwnership.settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=NUM_STEPS, deadline=None)

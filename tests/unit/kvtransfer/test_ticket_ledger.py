"""The ticket ledger: leases on an injected clock, and blocks that are freed exactly once."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.ledger import Entry, TicketLedger
from kvtransfer.states import State
from tandem.errors import Reason, TandemError
from tests.fakes.clock import Clock

LEASE_S = 5.0
GONE = TandemError(Reason.CANCELLED, "the prefill was cancelled")


class Fixture:
    """A ledger with its clock and what it freed."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.freed: list[tuple[int, ...]] = []
        self.ledger = TicketLedger(self.clock, LEASE_S, self._free)

    def _free(self, block_ids: Sequence[int]) -> None:
        self.freed.append(tuple(block_ids))


@pytest.fixture
def at() -> Fixture:
    return Fixture()


def refused(at: Fixture, ticket_id: str = "t", epoch: int = 1) -> bool:
    with pytest.raises(TandemError) as caught:
        at.ledger.open(ticket_id, epoch)
    return caught.value.reason is Reason.TICKET_NOT_FOUND


def test_from_grant_to_release(at: Fixture) -> None:
    entry = at.ledger.grant("t", 1, [4, 5, 6])
    assert entry.state is State.GRANTED
    at.ledger.progress("t", 2)
    assert (entry.state, entry.num_ready_blocks) == (State.FILLING, 2)
    at.ledger.finish("t", 77)
    assert (entry.state, entry.num_ready_blocks, entry.first_token_id) == (State.READY, 3, 77)
    at.ledger.open("t", 1)
    at.ledger.pulled(entry)
    at.ledger.close(entry)
    assert (entry.state, at.freed) == (State.PULLED, [])
    at.ledger.release("t", 1)
    assert (entry.state, at.freed, at.ledger.num_outstanding) == (State.RELEASED, [(4, 5, 6)], 0)


def test_steps_of_tickets_and_longer_leases_count_as_moves_and_nothing_else_does(at: Fixture) -> None:
    """By them is judged whether blocks that others wait for are being given back."""
    ledger = at.ledger
    entry = ledger.grant("t", 1, [4, 5])
    ledger.progress("t", 1)
    ledger.finish("t", 77)
    assert ledger.num_moves == 2
    ledger.open("t", 1)  # at the same moment: the lease gets no longer
    ledger.expire()
    assert ledger.num_moves == 2
    at.clock.now += 1.0
    ledger.open("t", 1)
    ledger.pulled(entry)
    assert ledger.num_moves == 4
    at.clock.now += LEASE_S
    ledger.expire()
    ledger.expire()
    assert (ledger.num_moves, entry.state) == (5, State.EXPIRED)


def test_while_filling_no_lease_runs(at: Fixture) -> None:
    at.ledger.grant("t", 1, [1])
    at.clock.now += 1e6
    assert at.ledger.expire() == []
    assert at.ledger.next_expiry is None
    at.ledger.finish("t", 7)
    assert at.ledger.next_expiry == at.clock.now + LEASE_S


def test_a_lease_ends_when_nobody_renews_it(at: Fixture) -> None:
    entry = at.ledger.grant("t", 1, [1, 2])
    at.ledger.finish("t", 7)
    for _ in range(3):
        at.clock.now += LEASE_S - 0.01
        assert at.ledger.expire() == []
        assert at.ledger.pulse.beat("t", 1)
    at.clock.now += LEASE_S - 0.01
    assert at.ledger.expire() == []
    at.clock.now += 0.01
    assert at.ledger.expire() == [entry]
    assert (entry.state, at.freed) == (State.EXPIRED, [(1, 2)])
    assert refused(at)


@pytest.mark.parametrize("end", ["release", "abort", "expire"])
def test_blocks_are_freed_at_once_whoever_reads(at: Fixture, end: str) -> None:
    """Readers hold nothing: a block's generation, and `get` for the producer's own senders, tell them that it is over."""
    entry = at.ledger.grant("t", 1, [1, 2])
    at.ledger.finish("t", 7)
    at.ledger.open("t", 1)
    if end == "release":
        at.ledger.release("t", 1)
    elif end == "abort":
        at.ledger.abort("t", GONE)
    else:
        at.clock.now += LEASE_S
        at.ledger.expire()
    assert entry.state.final and at.freed == [(1, 2)] and at.ledger.get("t") is None
    assert refused(at) and not at.ledger.pulse.beat("t", 1)
    at.ledger.close(entry)
    assert at.freed == [(1, 2)]


def test_an_open_stream_keeps_no_lease_alive(at: Fixture) -> None:
    at.ledger.grant("t", 1, [1])
    at.ledger.finish("t", 7)
    at.clock.now += 1
    at.ledger.open("t", 1)
    at.clock.now += LEASE_S
    assert len(at.ledger.expire()) == 1


def test_a_beat_of_another_epoch_renews_nothing(at: Fixture) -> None:
    at.ledger.grant("t", 2, [1])
    at.ledger.finish("t", 7)
    at.clock.now += LEASE_S
    assert not at.ledger.pulse.beat("t", 1)
    assert len(at.ledger.expire()) == 1


def test_readers_are_silent_once_their_beats_stop(at: Fixture) -> None:
    entry = at.ledger.grant("t", 1, [1])
    at.ledger.open("t", 1)
    at.clock.now += 100
    assert at.ledger.silent(1.5) == [], "whoever never beat is not silent"
    at.ledger.pulse.beat("t", 1)
    at.clock.now += 1.5
    assert at.ledger.silent(1.5) == []
    at.clock.now += 0.1
    assert at.ledger.silent(1.5) == [entry]
    at.ledger.open("t", 1)
    assert at.ledger.silent(1.5) == [], "another reader has just come"
    at.ledger.close(entry)
    at.ledger.close(entry)
    at.ledger.pulse.beat("t", 1)
    at.clock.now += 2
    assert at.ledger.silent(1.5) == [], "nobody reads"


def test_everything_may_come_twice_or_late(at: Fixture) -> None:
    at.ledger.grant("t", 1, [1])
    for _ in range(2):
        at.ledger.finish("t", 7)
    for _ in range(2):
        at.ledger.release("t", 1)
    at.ledger.progress("t", 1)
    at.ledger.finish("t", 8)
    at.ledger.abort("t", GONE)
    at.ledger.abort("t", GONE)
    at.ledger.release("never", 3)
    assert at.freed == [(1,)]


def test_another_epoch_is_refused(at: Fixture) -> None:
    at.ledger.grant("t", 2, [1])
    assert refused(at, "t", 1)
    with pytest.raises(TandemError) as caught:
        at.ledger.release("t", 1)
    assert caught.value.reason is Reason.TICKET_NOT_FOUND
    assert at.ledger.num_outstanding == 1 and at.freed == []


def test_an_abort_leaves_its_error_for_the_readers(at: Fixture) -> None:
    entry = at.ledger.grant("t", 1, [1])
    at.ledger.open("t", 1)
    at.ledger.abort("t", GONE)
    assert entry.error is GONE


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events: a block is freed once, when its ticket is over, and in the end always."""

    def __init__(self) -> None:
        super().__init__()
        self.at = Fixture()
        self.entries: list[Entry] = []
        self.readers: list[Entry] = []

    @rule(num_blocks=st.integers(1, 4), epoch=st.integers(1, 2))
    def grant(self, num_blocks: int, epoch: int) -> None:
        number = len(self.entries)
        blocks = range(number * 10, number * 10 + num_blocks)
        self.entries.append(self.at.ledger.grant(f"t{number}", epoch, list(blocks)))

    @rule(data=st.data(), event=st.sampled_from(["progress", "finish", "abort", "release", "wrong epoch", "open"]))
    def happen(self, data: st.DataObject, event: str) -> None:
        if not self.entries:
            return
        entry, ledger = data.draw(st.sampled_from(self.entries)), self.at.ledger
        before = entry.state
        match event:
            case "progress":
                ledger.progress(entry.ticket_id, data.draw(st.integers(0, len(entry.block_ids))))
            case "finish":
                ledger.finish(entry.ticket_id, 1)
            case "abort":
                ledger.abort(entry.ticket_id, GONE)
            case "release":
                ledger.release(entry.ticket_id, entry.epoch)
            case "wrong epoch":
                self._expect_refusal(lambda: ledger.open(entry.ticket_id, entry.epoch + 1))
            case "open" if before.final:
                self._expect_refusal(lambda: ledger.open(entry.ticket_id, entry.epoch))
            case "open":
                self.readers.append(ledger.open(entry.ticket_id, entry.epoch))
        assert not before.final or entry.state is before

    @rule(data=st.data(), completely=st.booleans())
    def close(self, data: st.DataObject, completely: bool) -> None:
        if self.readers:
            entry = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
            if completely:
                self.at.ledger.pulled(entry)
            self.at.ledger.close(entry)

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def wait(self, seconds: float) -> None:
        self.at.clock.now += seconds
        self.at.ledger.expire()

    @rule(data=st.data(), stale=st.booleans())
    def beat(self, data: st.DataObject, stale: bool) -> None:
        if self.entries:
            entry = data.draw(st.sampled_from(self.entries))
            assert self.at.ledger.pulse.beat(entry.ticket_id, entry.epoch + stale) is not (stale or entry.state.final)

    @invariant()
    def freed_exactly_when_over(self) -> None:
        over = [entry for entry in self.entries if entry.state.final]
        assert Counter(self.at.freed) == Counter(entry.block_ids for entry in over)
        assert self.at.ledger.num_outstanding == len(self.entries) - len(over)

    @invariant()
    def no_lease_is_overdue(self) -> None:
        moment = self.at.ledger.next_expiry
        assert moment is None or moment > self.at.clock.now

    def teardown(self) -> None:
        for entry in self.readers:
            self.at.ledger.close(entry)
        for entry in self.entries:
            self.at.ledger.finish(entry.ticket_id, 1)
        self.at.clock.now += LEASE_S
        self.at.ledger.expire()
        assert len(self.at.freed) == len(self.entries)

    @staticmethod
    def _expect_refusal(attempt: object) -> None:
        with pytest.raises(TandemError):
            attempt()  # type: ignore[operator]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)

"""A ticket at its consumer: transitions that may come twice or late, and how often a pull may fail."""

import numpy as np
import pytest

from kvtransfer.pull_state import DamagedBlockError, InterruptedPullError, PulledTickets, PullState, StalledPullError
from kvtransfer.states import State
from tandem.errors import Reason, TandemError
from tests.fakes.clock import Clock


@pytest.fixture
def state(clock: Clock) -> PullState:
    return PullState("t", 1, 3, clock)


def arrive(state: PullState, *indexes: int) -> None:
    for index in indexes:
        state.verified(index, np.ones(1, np.bool_))


def test_from_grant_to_release(state: PullState, clock: Clock) -> None:
    assert state.state is State.GRANTED
    for _ in range(2):
        state.filling()
        clock.now += 1
    assert (state.state, state.began_at) == (State.FILLING, 100.0)
    arrive(state, 0, 1, 2)
    state.ready()
    assert state.state is State.READY
    state.pulled()
    assert (state.state, state.ended_at) == (State.PULLED, 102.0)
    state.release()
    assert state.state is State.RELEASED


def test_no_state_goes_back_and_the_final_ones_stay(state: PullState) -> None:
    state.ready()
    state.filling()
    assert state.state is State.READY
    state.abort()
    for transition in (state.filling, state.ready, state.release, state.expire, state.abort):
        transition()
        assert state.state is State.ABORTED


def test_blocks_are_not_used_before_each_is_verified(state: PullState) -> None:
    arrive(state, 0, 2)
    with pytest.raises(AssertionError, match="not verified"):
        state.pulled()


def test_a_new_attempt_begins_at_the_first_block_that_is_not_verified(state: PullState) -> None:
    arrive(state, 0, 2)
    state.begin_attempt()
    assert state.num_verified == 1
    arrive(state, 1)
    assert state.num_verified == 2


def test_a_block_is_given_up_after_two_refetches(state: PullState) -> None:
    for _ in range(2):
        state.damaged(DamagedBlockError(1))
        state.damaged(DamagedBlockError(2))
    assert state.num_refetched == 4
    with pytest.raises(TandemError) as caught:
        state.damaged(DamagedBlockError(1))
    assert caught.value.reason is Reason.KV_CHECKSUM_MISMATCH


def test_a_pull_is_resumed_once(state: PullState) -> None:
    state.interrupted(InterruptedPullError("cut"))
    with pytest.raises(TandemError) as caught:
        state.interrupted(InterruptedPullError("cut"))
    assert caught.value.reason is Reason.TRANSFER_INTERRUPTED


def test_a_lost_producer_is_not_asked_again(state: PullState) -> None:
    with pytest.raises(TandemError) as caught:
        state.interrupted(StalledPullError("silent"))
    assert caught.value.reason is Reason.TRANSFER_INTERRUPTED


def test_a_pulled_ticket_of_another_epoch_is_another(clock: Clock) -> None:
    kept, state = PulledTickets(clock), PullState("a", 1, 0, clock)
    kept.keep(state, 5.0)
    assert not kept.release("a", 2)


def test_pulled_tickets_end_by_release_or_by_their_lease(clock: Clock) -> None:
    kept = PulledTickets(clock)
    states = [PullState(name, 1, 0, clock) for name in "abc"]
    for state in states[:2]:
        state.pulled()
        kept.keep(state, 5.0)
    assert kept.release("a", 1)
    assert not kept.release("a", 1) and not kept.release("never", 1)
    clock.now += 5.0
    states[2].pulled()
    kept.keep(states[2], 5.0)
    assert [state.state for state in states] == [State.RELEASED, State.EXPIRED, State.PULLED]
    assert len(kept) == 1

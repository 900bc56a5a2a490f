"""What failures mean for a request: pure policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.failover import MAX_BREAKS, Hop, HopFailed, Recovery
from gateway.routing import Role, Worker
from tandem.errors import Reason, TandemError


def worker(worker_id: str) -> Worker:
    return Worker(f"{worker_id}:1", Role.DECODE, worker_id, True)


def failure(reason: Reason, worker_id: str = "w", hop: Hop = Hop.DECODE, held: bool = True) -> HopFailed:
    return HopFailed(hop, (worker(worker_id),), TandemError(reason, "no"), held)


def test_refusals_cost_nothing_however_many_there_are() -> None:
    recovery = Recovery()
    for number in range(50):
        recovery.failed(failure(Reason.QUEUE_FULL, f"w{number}"), ())
    assert len(recovery.tried) == 50
    assert recovery.num_breaks == 0
    recovery.new_round()
    assert not recovery.tried and len(recovery.avoided) == 50


@pytest.mark.parametrize(
    "reason", [Reason.INVALID_REQUEST, Reason.MODEL_MISMATCH, Reason.KV_LAYOUT_MISMATCH, Reason.DEADLINE_EXCEEDED]
)
def test_what_every_worker_would_say_ends_the_request(reason: Reason) -> None:
    with pytest.raises(TandemError) as raised:
        Recovery().failed(failure(reason), ())
    assert raised.value.reason is reason


@pytest.mark.parametrize("hop", [Hop.PREFILL, Hop.DECODE])
def test_two_deaths_in_a_row_are_the_requests_doing(hop: Hop) -> None:
    recovery = Recovery()
    recovery.failed(failure(Reason.WORKER_LOST, "one", hop), ())
    assert recovery.suspected(hop)
    with pytest.raises(TandemError) as raised:
        recovery.failed(failure(Reason.ENGINE_FAILED, "two", hop), ())
    assert raised.value.reason is Reason.REQUEST_QUARANTINED


def test_deaths_before_the_request_was_taken_are_not_its_doing() -> None:
    recovery = Recovery()
    for number in range(MAX_BREAKS - 1):
        recovery.failed(failure(Reason.WORKER_LOST, f"w{number}", held=False), ())
    assert not recovery.suspected(Hop.DECODE)


def test_progress_at_the_hop_earns_another_try() -> None:
    recovery = Recovery()
    for number in range(MAX_BREAKS - 1):
        recovery.failed(failure(Reason.WORKER_LOST, f"w{number}"), (Hop.PREFILL, Hop.HANDOFF, Hop.DECODE))
    with pytest.raises(TandemError):
        recovery.failed(failure(Reason.WORKER_LOST, "last"), (Hop.PREFILL, Hop.HANDOFF, Hop.DECODE))


def test_deaths_of_different_kinds_of_worker_do_not_add_up() -> None:
    recovery = Recovery()
    recovery.failed(failure(Reason.WORKER_LOST, "d", Hop.DECODE), (Hop.PREFILL, Hop.HANDOFF))
    recovery.failed(failure(Reason.WORKER_LOST, "p", Hop.PREFILL), ())
    assert recovery.suspected(Hop.DECODE) and recovery.suspected(Hop.PREFILL)


def test_a_worker_that_is_cut_off_twice_has_not_died_twice() -> None:
    recovery = Recovery()
    recovery.failed(failure(Reason.WORKER_LOST, "same"), ())
    recovery.failed(failure(Reason.WORKER_LOST, "same"), ())
    with pytest.raises(TandemError) as raised:
        recovery.failed(failure(Reason.WORKER_LOST, "other"), ())
    assert raised.value.reason is Reason.REQUEST_QUARANTINED


def test_a_handoff_is_tried_once_more_even_between_the_same_two() -> None:
    recovery = Recovery()
    recovery.failed(failure(Reason.TICKET_NOT_FOUND, hop=Hop.HANDOFF), (Hop.PREFILL,))
    assert not recovery.tried and recovery.avoided
    with pytest.raises(TandemError) as raised:
        recovery.failed(failure(Reason.TRANSFER_INTERRUPTED, hop=Hop.HANDOFF), (Hop.PREFILL,))
    assert raised.value.reason is Reason.TRANSFER_INTERRUPTED


REASONS = st.sampled_from(
    [Reason.WORKER_LOST, Reason.ENGINE_FAILED, Reason.INTERNAL, Reason.TRANSFER_INTERRUPTED, Reason.QUEUE_FULL]
)
STEPS = st.tuples(REASONS, st.integers(0, 5), st.sampled_from(Hop), st.booleans(), st.integers(0, 3))


@given(st.lists(STEPS, min_size=20, max_size=60))
def test_no_request_costs_more_workers_than_it_may(steps: list[tuple[Reason, int, Hop, bool, int]]) -> None:
    recovery, breaks, deaths_in_a_row = Recovery(), 0, dict.fromkeys(Hop, 0)
    for reason, number, hop, held, num_passed in steps:
        passed = list(Hop)[: min(num_passed, list(Hop).index(hop) + (hop is Hop.DECODE))]
        deaths_in_a_row |= dict.fromkeys(passed, 0)
        failed = failure(reason, f"w{number}", hop, held)
        breaks += failed.broken
        deaths_in_a_row[hop] += failed.death and held and reason is not Reason.WORKER_LOST
        try:
            recovery.failed(failed, passed)
        except TandemError:
            return
        assert breaks < MAX_BREAKS
        assert max(deaths_in_a_row.values()) < 2

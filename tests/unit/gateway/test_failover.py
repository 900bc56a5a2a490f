"""What failures mean for a request: pure policy."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.failover import MAX_FAILURES, MAX_MOVES, Hop, HopFailed, Loss, Recovery
from gateway.routing import Role, Worker
from tandem.errors import Reason, TandemError


def worker(worker_id: str) -> Worker:
    return Worker(f"{worker_id}:1", Role.DECODE, worker_id, True)


def failure(reason: Reason, worker_id: str = "w", hop: Hop = Hop.DECODE, held: bool = True) -> HopFailed:
    workers = (worker(worker_id), worker(f"p{worker_id}")) if hop is Hop.HANDOFF else (worker(worker_id),)
    return HopFailed(hop, workers, TandemError(reason, "no"), held)


ALL_HOPS = (Hop.PREFILL, Hop.HANDOFF, Hop.DECODE)


def fail(recovery: Recovery, failed: HopFailed, passed: Collection[Hop] = (), *, ended: bool | None = False) -> None:
    recovery.passed(passed)
    recovery.failed(failed, Loss(ended))


def test_refusals_cost_nothing_however_many_there_are() -> None:
    recovery = Recovery()
    for number in range(50):
        fail(recovery, failure(Reason.QUEUE_FULL, f"w{number}"))
    assert len(recovery.tried) == 50
    recovery.new_round()
    assert not recovery.tried and len(recovery.avoided) == 50


@pytest.mark.parametrize(
    "reason", [Reason.INVALID_REQUEST, Reason.MODEL_MISMATCH, Reason.KV_LAYOUT_MISMATCH, Reason.DEADLINE_EXCEEDED]
)
def test_what_every_worker_would_say_ends_the_request(reason: Reason) -> None:
    with pytest.raises(TandemError) as raised:
        fail(Recovery(), failure(reason))
    assert raised.value.reason is reason


@pytest.mark.parametrize("hop", [Hop.PREFILL, Hop.DECODE])
def test_two_deaths_in_a_row_are_the_requests_doing(hop: Hop) -> None:
    recovery = Recovery()
    fail(recovery, failure(Reason.WORKER_LOST, "one", hop), ended=True)
    assert recovery.suspects(hop)
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(Reason.ENGINE_FAILED, "two", hop))
    assert raised.value.reason is Reason.REQUEST_QUARANTINED


def test_a_death_that_is_proved_later_counts() -> None:
    recovery, open_yet = Recovery(), Loss()
    recovery.failed(failure(Reason.WORKER_LOST, "one"), open_yet)
    assert recovery.suspects(Hop.DECODE) == [open_yet]
    open_yet.ended = True
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(Reason.WORKER_LOST, "two"), ended=True)
    assert raised.value.reason is Reason.REQUEST_QUARANTINED


def test_silence_is_no_death_however_often_it_comes() -> None:
    recovery = Recovery()
    for number in range(MAX_MOVES - 1):
        fail(recovery, failure(Reason.WORKER_LOST, f"w{number}"), ended=False)
        assert not recovery.suspects(Hop.DECODE)
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(Reason.WORKER_LOST, "last"), ended=False)
    assert raised.value.reason is Reason.WORKER_LOST


def test_silence_between_two_deaths_does_not_hide_them() -> None:
    recovery = Recovery()
    fail(recovery, failure(Reason.WORKER_LOST, "one"), ended=True)
    fail(recovery, failure(Reason.WORKER_LOST, "frozen"), ended=False)
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(Reason.WORKER_LOST, "two"), ended=True)
    assert raised.value.reason is Reason.REQUEST_QUARANTINED
    assert raised.value.metadata["worker_deaths"] == "2"


def test_deaths_before_the_request_was_taken_are_not_its_doing() -> None:
    recovery = Recovery()
    for number in range(MAX_MOVES - 1):
        fail(recovery, failure(Reason.WORKER_LOST, f"w{number}", held=False), ended=True)
    assert not recovery.suspects(Hop.DECODE)


@pytest.mark.parametrize("reason", [Reason.INTERNAL, Reason.UNIMPLEMENTED])
def test_nonsense_is_heard_twice_in_a_row(reason: Reason) -> None:
    recovery = Recovery()
    fail(recovery, failure(reason, "one"))
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(reason, "two"))
    assert raised.value.reason is reason


def test_progress_at_the_hop_earns_another_try() -> None:
    recovery = Recovery()
    for number in range(MAX_FAILURES - 1):
        fail(recovery, failure(Reason.WORKER_LOST, f"w{number}"), ALL_HOPS, ended=True)
    with pytest.raises(TandemError):
        fail(recovery, failure(Reason.WORKER_LOST, "last"), ALL_HOPS, ended=True)


def test_honest_losses_of_a_long_completion_are_not_counted() -> None:
    recovery = Recovery()
    for number in range(10 * MAX_MOVES):
        fail(recovery, failure(Reason.WORKER_LOST, f"w{number}"), ALL_HOPS, ended=False)


def test_deaths_of_different_kinds_of_worker_do_not_add_up() -> None:
    recovery = Recovery()
    fail(recovery, failure(Reason.WORKER_LOST, "d", Hop.DECODE), (Hop.PREFILL, Hop.HANDOFF), ended=True)
    fail(recovery, failure(Reason.WORKER_LOST, "p", Hop.PREFILL), ended=True)
    assert recovery.suspects(Hop.DECODE) and recovery.suspects(Hop.PREFILL)


def test_a_worker_that_is_cut_off_twice_has_not_died_twice() -> None:
    recovery, loss = Recovery(), Loss()
    recovery.failed(failure(Reason.WORKER_LOST, "same"), loss)
    recovery.failed(failure(Reason.WORKER_LOST, "same"), loss)
    loss.ended = True
    with pytest.raises(TandemError) as raised:
        fail(recovery, failure(Reason.WORKER_LOST, "other"), ended=True)
    assert raised.value.metadata["worker_deaths"] == "2"


def test_a_prefill_workers_death_counts_also_where_its_blocks_are_missed_first() -> None:
    recovery, open_yet = Recovery(), Loss()
    recovery.failed(handoff("one", "d", held=True), open_yet)
    assert recovery.suspects(Hop.PREFILL) == [open_yet]
    open_yet.ended = True
    with pytest.raises(TandemError) as raised:
        fail(recovery, handoff("two", "d", held=True), ended=True)
    assert raised.value.reason is Reason.REQUEST_QUARANTINED


def test_once_the_prompt_is_computed_a_broken_handoff_is_no_suspicion() -> None:
    recovery = Recovery()
    for number in range(MAX_MOVES - 1):
        fail(recovery, handoff(f"p{number}", "d"), (Hop.PREFILL,), ended=True)
    assert not recovery.suspects(Hop.PREFILL)


def handoff(prefill: str, decode: str, *, held: bool = False) -> HopFailed:
    return HopFailed(Hop.HANDOFF, (worker(decode), worker(prefill)), TandemError(Reason.TRANSFER_INTERRUPTED, "no"), held)


def test_a_handoff_is_tried_once_more_even_between_the_same_two() -> None:
    recovery = Recovery()
    fail(recovery, handoff("p", "d"), (Hop.PREFILL,))
    assert not recovery.tried_pairs and recovery.avoided == {"p", "d"}
    fail(recovery, handoff("p", "d"), (Hop.PREFILL,))
    assert recovery.tried_pairs == {("p", "d")}
    recovery.new_round()
    assert not recovery.tried_pairs
    fail(recovery, handoff("p", "d"), (Hop.PREFILL,))
    assert recovery.tried_pairs == {("p", "d")}, "it has not earned two tries again"
    recovery.passed((Hop.PREFILL, Hop.HANDOFF))
    recovery.new_round()
    fail(recovery, handoff("p", "d"), (Hop.PREFILL,))
    assert not recovery.tried_pairs


def test_each_pair_is_a_handoff_of_its_own() -> None:
    recovery = Recovery()
    for number in range(MAX_MOVES - 1):
        fail(recovery, handoff("p", f"d{number}"), (Hop.PREFILL,))
    assert not recovery.tried_pairs and not recovery.tried
    with pytest.raises(TandemError) as raised:
        fail(recovery, handoff("p", "last"), (Hop.PREFILL,))
    assert raised.value.reason is Reason.TRANSFER_INTERRUPTED


REASONS = st.sampled_from(
    [Reason.WORKER_LOST, Reason.ENGINE_FAILED, Reason.INTERNAL, Reason.TRANSFER_INTERRUPTED, Reason.QUEUE_FULL]
)
STEPS = st.tuples(REASONS, st.integers(0, 5), st.sampled_from(Hop), st.booleans(), st.integers(0, 3), st.booleans())


@given(st.lists(STEPS, min_size=20, max_size=60))
def test_no_request_costs_more_workers_than_it_may(steps: list[tuple[Reason, int, Hop, bool, int, bool]]) -> None:
    recovery, moves, deaths, dead_in_a_row = Recovery(), 0, 0, {hop: set[str]() for hop in Hop}
    for reason, number, hop, held, num_passed, ended in steps:
        passed = list(Hop)[: min(num_passed, list(Hop).index(hop) + (hop is Hop.DECODE))]
        dead_in_a_row |= {each: set() for each in passed}
        failed = failure(reason, f"w{number}", hop, held)
        moves = 0 if Hop.DECODE in passed else moves
        moves += failed.broken
        silent = hop is Hop.HANDOFF or reason is Reason.WORKER_LOST
        if failed.suspected is not None and failed.broken and (ended if silent else reason is Reason.ENGINE_FAILED):
            suspected, dead = failed.suspected
            deaths += 1
            dead_in_a_row[suspected].add(dead.worker_id)
        try:
            fail(recovery, failed, passed, ended=ended)
        except TandemError:
            return
        assert moves < MAX_MOVES
        assert deaths < MAX_FAILURES
        assert max(map(len, dead_in_a_row.values())) < 2

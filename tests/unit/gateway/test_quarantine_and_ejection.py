"""What is remembered of bad requests and bad workers, and for how long: pure policy under a clock of the test's."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import ejection, quarantine
from gateway.ejection import Ejector
from gateway.job import GenerationJob, OutputOptions, Sampling, Stopping
from gateway.quarantine import Quarantine, fingerprint
from gateway.routing import Role, Worker
from tandem.errors import Reason, TandemError
from tests.fakes.clock import Clock

JOB = GenerationJob("id", "model", (1, 2, 3), Sampling(seed=1), Stopping(5), OutputOptions(), 100.0)


def test_a_request_is_known_by_its_tokens_and_sampling() -> None:
    same = replace(JOB, request_id="other", sampling=replace(JOB.sampling, seed=2), token_ids=[1, 2, 3])
    assert fingerprint(same) == fingerprint(JOB)
    assert fingerprint(replace(JOB, token_ids=(1, 2))) != fingerprint(JOB)
    assert fingerprint(replace(JOB, sampling=Sampling(temperature=0.5))) != fingerprint(JOB)


def test_quarantine_ends(clock: Clock) -> None:
    remembered = Quarantine(clock)
    remembered.check(JOB)
    remembered.add(JOB)
    with pytest.raises(TandemError) as raised:
        remembered.check(JOB)
    assert raised.value.reason is Reason.REQUEST_QUARANTINED
    remembered.check(replace(JOB, token_ids=(9,)))
    clock.now += quarantine.QUARANTINE_S
    remembered.check(JOB)


def test_quarantine_holds_the_latest(clock: Clock) -> None:
    remembered = Quarantine(clock)
    for number in range(quarantine.MAX_REMEMBERED + 1):
        remembered.add(replace(JOB, token_ids=(number,)))
    remembered.check(replace(JOB, token_ids=(0,)))
    with pytest.raises(TandemError):
        remembered.check(replace(JOB, token_ids=(1,)))
    assert len(remembered._until) == quarantine.MAX_REMEMBERED


def test_the_first_failure_costs_nothing_and_later_ones_ever_more(clock: Clock) -> None:
    ejector, pauses = Ejector(clock), []
    for _ in range(9):
        clock.now += 1
        ejector.failed("a:1")
        began = clock.now
        while ejector.ejected("a:1"):
            clock.now += 0.5
        pauses.append(clock.now - began)
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert ejector.num_ejections == 8
    assert not ejector.ejected("b:1")


def test_all_streams_of_one_death_are_one_failure(clock: Clock) -> None:
    ejector = Ejector(clock)
    for _ in range(20):
        ejector.failed("a:1")
        clock.now += ejection.ONE_FAILURE_S / 30
    assert not ejector.ejected("a:1")


def test_an_address_that_keeps_quiet_is_forgiven(clock: Clock) -> None:
    ejector = Ejector(clock)
    for _ in range(3):
        clock.now += 1
        ejector.failed("a:1")
    clock.now += 3 + ejection.FORGOTTEN_AFTER_S
    ejector.failed("a:1")
    assert not ejector.ejected("a:1")


def test_addresses_that_are_gone_are_forgotten(clock: Clock) -> None:
    ejector = Ejector(clock)
    for number in range(500):
        clock.now += 1
        ejector.failed(f"a{number}:1")
    assert len(ejector._records) <= ejection.FORGOTTEN_AFTER_S + 1


def test_an_orderly_end_is_no_failure(clock: Clock) -> None:
    ejector, worker = Ejector(clock), Worker("a:1", Role.DECODE, "id", ready=True)
    for ready in (False, False, True):
        clock.now += 1
        ejector.lost(replace(worker, ready=ready))
    assert not ejector.ejected("a:1")
    clock.now += 1
    ejector.lost(worker)
    assert ejector.ejected("a:1")


@given(st.lists(st.floats(0, 40), max_size=50))
def test_no_ejection_lasts_longer_than_the_longest(gaps_s: list[float]) -> None:
    clock = Clock()
    ejector = Ejector(clock)
    for gap_s in gaps_s:
        clock.now += gap_s
        ejector.failed("a:1")
    clock.now += ejection.LONGEST_PAUSE_S
    assert not ejector.ejected("a:1")

"""Pairs whose hand-off broke, under a clock of the test's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import links
from gateway.links import Links
from tests.fakes.clock import Clock

PAIR, OTHER = ("p", "d"), ("p", "e")


@pytest.fixture
def known(clock: Clock) -> Links:
    return Links(clock)


def test_a_broken_pair_is_avoided_for_a_while(known: Links, clock: Clock) -> None:
    known.broke(PAIR)
    assert known.avoided == {PAIR}
    clock.now += links.FIRST_PAUSE_S
    assert not known.avoided


def test_one_request_probes_while_the_others_wait(known: Links, clock: Clock) -> None:
    known.broke(PAIR)
    clock.now += links.FIRST_PAUSE_S
    known.chosen(PAIR)
    assert known.avoided == {PAIR}
    known.passed(PAIR)
    assert not known.avoided
    known.chosen(PAIR)
    assert not known.avoided


def test_a_probe_without_an_outcome_is_followed_by_another(known: Links, clock: Clock) -> None:
    known.broke(PAIR)
    clock.now += links.FIRST_PAUSE_S
    known.chosen(PAIR)
    clock.now += links.PROBE_S
    assert not known.avoided


def test_each_probe_that_breaks_doubles_the_pause(known: Links, clock: Clock) -> None:
    pauses = []
    for _ in range(6):
        known.broke(PAIR)
        began = clock.now
        while PAIR in known.avoided:
            clock.now += 1.0
        pauses.append(clock.now - began)
        known.chosen(PAIR)
    assert pauses == [4, 8, 16, 30, 30, 30]


def test_all_requests_that_were_under_way_are_one_break(known: Links, clock: Clock) -> None:
    for _ in range(20):
        known.broke(PAIR)
        known.chosen(PAIR)  # there was no other
    clock.now += links.FIRST_PAUSE_S
    assert not known.avoided


def test_the_latest_are_remembered(known: Links) -> None:
    for number in range(links.MAX_REMEMBERED + 1):
        known.broke(("p", str(number)))
    assert len(known.avoided) == links.MAX_REMEMBERED
    assert ("p", "0") not in known.avoided


EVENTS = st.sampled_from(["broke", "chosen", "passed"])


@given(st.lists(st.tuples(EVENTS, st.sampled_from([PAIR, OTHER]), st.floats(0, 40)), max_size=60))
def test_no_pair_is_avoided_for_longer_than_the_longest_pause(events: list[tuple[str, tuple[str, str], float]]) -> None:
    clock = Clock()
    known = Links(clock)
    for event, pair, pause_s in events:
        getattr(known, event)(pair)
        if event == "passed":
            assert pair not in known.avoided
        clock.now += pause_s
    clock.now += links.LONGEST_PAUSE_S
    assert not known.avoided

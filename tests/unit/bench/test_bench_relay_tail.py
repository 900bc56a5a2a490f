"""Which step a token is of, and how long it was on its way."""

import pytest

from bench.records import Record
from bench.relay_tail import delays_ms

STEP_ENDS_US = range(0, 200_000, 10_000)


def record_of(*arrivals):
    """A request whose first token, which is no decode step's, came at once; then (moment in microseconds, tokens) each."""
    record = Record(number=0, prompt_tokens=8, sent_us=0)
    for moment, count in ((5_000, 1), *arrivals):
        record.note_arrival(moment, count)
    return record


def test_tokens_are_those_of_consecutive_steps():
    assert list(delays_ms([record_of((31_000, 1), (42_000, 1), (53_000, 1))], STEP_ENDS_US)) == [1, 2, 3]


def test_a_token_later_than_the_next_step_is_late_and_not_of_that_step():
    assert list(delays_ms([record_of((31_000, 1), (57_000, 1), (58_000, 1))], STEP_ENDS_US)) == [1, 17, 8]


def test_tokens_of_one_message_are_of_several_steps():
    assert list(delays_ms([record_of((31_000, 1), (57_000, 2))], STEP_ENDS_US)) == [1, 17, 7]


@pytest.mark.parametrize("moments", [(), (31_000,)])
def test_requests_of_few_tokens(moments):
    assert len(list(delays_ms([record_of(*((moment, 1) for moment in moments))], STEP_ENDS_US))) == len(moments)

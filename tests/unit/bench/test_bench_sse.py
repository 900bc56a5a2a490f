"""Server-sent events however they are cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bench.sse import EventParser

STREAM = (
    'data: {"a": 1}\r\n\r\n: a comment\n\ndata: two\ndata:  lines\n\nevent: x\rdata: schön \u2028 \x0b\r\rdata: [DONE]\n\n'.encode()
)
EVENTS = ['{"a": 1}', "two\n lines", "schön \u2028 \x0b", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_stream_is_cut(cuts):
    bounds = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    pieces = [STREAM[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_event_is_given_as_soon_as_it_is_complete():
    parser = EventParser()
    assert parser.feed(b"data: now\n") == []
    assert parser.feed(b"\n") == ["now"]


def test_a_byte_order_mark_is_passed_over():
    assert EventParser().feed(b"\xef\xbb\xbfdata: x\n\n") == ["x"]

"""Detokenizing and stop strings: text in pieces equals text at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.completion import Completion
from gateway.detokenizer import Detokenizer
from gateway.job import Ending, FinishReason, GenerationJob, Handoff, Output, OutputOptions, Sampling, Stopping, Timings, Token
from gateway.pending import PendingOutput
from gateway.stop import StopMatcher
from gateway.timeline import Timeline
from gateway.tokenizer import byte_level_tokenizer
from tandem.errors import TandemError

TOKENIZER = byte_level_tokenizer()

texts = st.text(max_size=60)
stops = st.lists(st.text(alphabet="ab\N{SNOWMAN}", min_size=1, max_size=5), min_size=1, max_size=4)


def pieces_of(token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 520), max_size=80))
def test_pieces_join_to_the_whole_for_any_tokens(token_ids: list[int]) -> None:
    assert "".join(pieces_of(token_ids)) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@given(texts)
def test_no_piece_holds_part_of_a_code_point(text: str) -> None:
    token_ids = [3 + byte for byte in text.encode()]
    pieces = pieces_of(token_ids)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@given(texts)
def test_every_text_comes_back(text: str) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=True)
    assert TOKENIZER.decode(token_ids, skip_special_tokens=False) == text


def pushed(matcher: StopMatcher, pieces: list[str]) -> str:
    return "".join(map(matcher.push, pieces)) + matcher.flush()


@given(stops, st.lists(st.text(alphabet="ab\N{SNOWMAN}c", max_size=6), max_size=12))
def test_the_result_does_not_depend_on_the_pieces(stop: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    in_pieces, by_character = StopMatcher(stop), StopMatcher(stop)
    assert pushed(in_pieces, pieces) == pushed(by_character, list(whole))
    assert in_pieces.matched == by_character.matched == any(each in whole for each in stop)


@given(stops, st.text(alphabet="ab\N{SNOWMAN}c", max_size=40))
def test_nothing_of_a_stop_string_is_shown_and_no_more_than_needed_held(stop: list[str], text: str) -> None:
    matcher, shown = StopMatcher(stop), ""
    for number, character in enumerate(text, 1):
        shown += matcher.push(character)
        if matcher.matched:
            break
        held = text[len(shown) : number]
        assert text.startswith(shown)
        assert not held or any(each.startswith(held) for each in stop)
    assert not any(each in shown for each in stop)


def test_the_stop_that_is_complete_first_wins() -> None:
    for pieces in (["abcd"], ["abc", "d"], list("abcd")):
        matcher = StopMatcher(["abcd", "c"])
        assert pushed(matcher, pieces) == "ab"


def job(**stopping: object) -> GenerationJob:
    rule = Stopping(**{"max_tokens": 100, "end_token_ids": frozenset({2}), **stopping})  # type: ignore[arg-type]
    return GenerationJob("request", "digest", [1], Sampling(), rule, OutputOptions(), 0.0)


def tokens(text: str) -> list[Token]:
    return [Token(3 + byte) for byte in text.encode()]


async def test_a_completion_drops_what_comes_after_its_end() -> None:
    pending = PendingOutput()
    completion = Completion(job(), TOKENIZER, pending)
    completion.push(0, [*tokens("ab"), Token(2), *tokens("cd")])
    output = await pending.take()
    assert isinstance(output, Output)
    assert (output.text, len(output.tokens), completion.finished) == ("ab", 3, FinishReason.STOP)


@pytest.mark.parametrize("index", [1, 3])
def test_gaps_and_repeats_are_refused(index: int) -> None:
    completion = Completion(job(), TOKENIZER, PendingOutput())
    completion.push(0, tokens("ab"))
    with pytest.raises(TandemError, match="was due"):
        completion.push(index, tokens("c"))


async def test_stop_strings_count_from_min_tokens_on() -> None:
    pending = PendingOutput()
    completion = Completion(job(stop_strings=("x",), min_tokens=3), TOKENIZER, pending)
    completion.push(0, tokens("xxxabxc"))
    output = await pending.take()
    assert isinstance(output, Output)
    assert output.text == "xxxab"


async def test_what_a_slow_writer_has_not_taken_is_one_output() -> None:
    pending = PendingOutput(max_cost=4)
    ending = Ending(FinishReason.STOP, 0, 5, Timings(0, 0, 0, 0, 0, 0, 0), Handoff())
    pending.add(Output(0, "a", tokens("a"), prompt=()))
    pending.add(Output(1, "bc", tokens("bc")))
    pending.add(Output(3, "d", tokens("d")))
    assert not pending._room.is_set()
    pending.finish(ending)
    output = await pending.take()
    assert output == Output(0, "abcd", tokens("abcd"), prompt=())
    assert pending._room.is_set()
    assert await pending.take() is ending


async def test_a_failure_comes_after_what_was_there() -> None:
    pending = PendingOutput()
    pending.add(Output(0, "a"))
    pending.finish(RuntimeError("broken"))
    assert await pending.take() == Output(0, "a")
    with pytest.raises(RuntimeError, match="broken"):
        await pending.take()


@given(st.lists(st.integers(0, 10**9), min_size=6, max_size=6), st.integers(0, 10**7), st.integers(0, 10**7), st.booleans())
def test_phases_add_up_to_the_wall_time(gaps_ns: list[int], prefill_queue_us: int, decode_queue_us: int, early: bool) -> None:
    now = 0

    def clock() -> float:
        return now / 1e9

    timeline = Timeline(clock)
    marks = [timeline.tokenized, timeline.placed, timeline.first_token, timeline.kv_ready]
    if early:  # decode may hold all blocks before the first token has arrived here
        marks[2:] = reversed(marks[2:])
    for gap_ns, mark in zip(gaps_ns, marks, strict=False):
        now += gap_ns
        mark()
    now += gaps_ns[-1]
    timeline.prefill_queue_us, timeline.decode_queue_us = prefill_queue_us, decode_queue_us
    timings = timeline.timings()
    assert abs(timings.wall_us - now // 1000) <= 5
    assert all(getattr(timings, name) >= 0 for name in timings.__dataclass_fields__)


async def test_log_probabilities_take_their_room_too() -> None:
    pending = PendingOutput(max_cost=40)
    rich = [Token(5, -0.5, tuple((rank, -1.0) for rank in range(20)))]
    pending.add(Output(0, "a", list(rich)))
    assert pending._room.is_set()
    pending.add(Output(1, "a", list(rich)))
    assert not pending._room.is_set()
    await pending.take()
    pending.add(Output(2, "a", list(rich)))
    assert pending._room.is_set()

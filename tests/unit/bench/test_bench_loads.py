"""What is sent when: the same for the same seed, and as often as it says."""

import argparse
import itertools
import statistics

import pytest

from bench.loads import ClosedLoop, Extent, PoissonArrivals, TraceReplay, parse_load, prompt_ids


def test_loads_are_read_from_their_short_forms(tmp_path):
    assert parse_load("256/128/16") == ClosedLoop(256, 128, 16)
    assert parse_load("1024/128@2.5") == PoissonArrivals(1024, 128, 2.5)
    assert parse_load("trace:some/azure.csv@2x0.25").name == "azure x2"
    assert parse_load("trace:azure.csv") == TraceReplay(parse_load("trace:azure.csv").path, 1.0, 1.0)


@pytest.mark.parametrize(
    "text", ["", "256", "256/128", "256/0/4", "a/b/c", "256/128@0", "256/128@-3", "256/128@nan", "trace:a@fast"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_load(text)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process():
    arrivals = PoissonArrivals(10, 10, 50.0).arrivals(Extent(seconds=100), seed=3)
    moments = [each.due_s for each in arrivals]
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert moments == sorted(moments) and moments[-1] < 100
    assert len(arrivals) == pytest.approx(5000, rel=0.06)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, abs=0.06)


def test_arrivals_are_a_function_of_the_seed():
    load = PoissonArrivals(10, 10, 20.0)
    assert load.arrivals(Extent(seconds=5), seed=1) == load.arrivals(Extent(seconds=5), seed=1)
    assert load.arrivals(Extent(seconds=5), seed=1) != load.arrivals(Extent(seconds=5), seed=2)


def test_a_number_of_requests_bounds_an_open_loop():
    assert len(PoissonArrivals(10, 10, 20.0).arrivals(Extent(num_requests=37), seed=0)) == 37


def test_streams_of_a_closed_loop_share_the_numbers_among_them():
    loop, extent = ClosedLoop(8, 4, 3), Extent(num_requests=10)
    numbers = [[each.number for each in loop.requests_of(stream, loop.num_requests(extent))] for stream in range(3)]
    assert numbers == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert loop.num_requests(Extent()) == 12
    assert loop.num_requests(Extent(seconds=3)) is None


def test_a_trace_is_replayed_in_order_scaled_and_from_its_first_moment(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:48.5000000,4,3\n2023-11-16 18:15:46.5000000,400,100\n"
    )
    first, second = TraceReplay(path, speed=2.0, lengths=0.1).arrivals(Extent(), seed=0)
    assert (first.due_s, first.prompt_tokens, first.completion_tokens) == (0.0, 40, 10)
    assert (second.due_s, second.prompt_tokens, second.completion_tokens) == (1.0, 1, 1)
    assert len(TraceReplay(path).arrivals(Extent(seconds=1.5), seed=0)) == 1


def test_a_trace_of_plain_seconds_needs_no_names(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("10.5,4,3\n11,5,6\n")
    assert [each.due_s for each in TraceReplay(path).arrivals(Extent(), seed=0)] == [0.0, 0.5]


def test_rows_of_names_before_a_trace_are_skipped_and_later_ones_are_not(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("conversation trace\n\ntime,prompt,completion\nin seconds,tokens,tokens\n1,2,3\n")
    assert len(TraceReplay(path).arrivals(Extent(), seed=0)) == 1
    path.write_text("1,2,3\ntime,prompt,completion\n")
    with pytest.raises(ValueError, match="line 2"):
        TraceReplay(path).arrivals(Extent(), seed=0)


@pytest.mark.parametrize("content", ["", "time,prompt,completion\n", "1,2\n", "1,2,x\n", "soon,2,3\n"])
def test_a_malformed_trace_is_refused(tmp_path, content):
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="trace"):
        TraceReplay(path).arrivals(Extent(), seed=0)


def test_prompts_are_random_within_the_vocabulary_and_repeatable():
    ids = prompt_ids(-1, 5, 1000, 512)
    assert ids == prompt_ids(-1, 5, 1000, 512)
    assert ids[:50] != prompt_ids(-1, 6, 1000, 512)[:50]
    assert min(ids) >= 100 and max(ids) < 512

"""Figures of hand-made records."""

import argparse

import pytest

from bench.figures import Objective, Window, figures_of, parse_objective, percentile
from bench.loads import Extent
from bench.records import Measurement, Record
from bench.report import better_by


def record(number: int, sent_ms: int, *arrivals_ms: int, error: str = "", counts: list[int] | None = None) -> Record:
    counts = counts or [1] * len(arrivals_ms)
    return Record(
        number,
        prompt_tokens=100,
        sent_us=sent_ms * 1000,
        arrivals_us=[moment * 1000 for moment in arrivals_ms],
        counts=counts,
        completion_tokens=sum(counts),
        error=error,
    )


def test_latencies_of_one_request():
    one = record(0, 100, 150, 160, 190)
    assert (one.ttft_ms, one.tpot_ms, one.gaps_ms) == (50.0, 20.0, [10.0, 30.0])


def test_tokens_that_come_together_count_for_time_per_token_and_not_as_gaps():
    one = record(0, 0, 10, 30, counts=[1, 4])
    assert (one.tpot_ms, one.gaps_ms) == (5.0, [20.0])
    assert record(0, 0, 10, counts=[3]).tpot_ms is None


def test_warmup_is_not_counted_and_rates_are_those_of_the_window():
    records = [
        record(0, 500, 600, 1500),
        record(1, 1200, 1300, 1400, 2400),
        record(2, 1900, 2900, 2990),
        record(3, 2500, 2600, 3500),
    ]
    figures = figures_of(Measurement(records), Extent(seconds=3.0, warmup_s=1.0), Objective())
    assert figures["requests"] == 3
    assert figures["requests_per_second"] == 3 / 2
    assert figures["output_tokens_per_second"] == 7 / 2
    assert figures["ttft_p50_ms"] == 100
    assert figures["ttft_p99_ms"] == 1000
    assert figures["handoff_p50_ms"] == 100
    assert figures["itl_max_ms"] == 1000


def test_without_a_time_limit_the_window_ends_with_the_last_token():
    window = Window.of(Extent(num_requests=2), [record(0, 10, 20, 50), record(1, 20, 90)])
    assert window.has(10_000) and window.has(90_000) and not window.has(90_002)


def test_goodput_counts_requests_that_meet_every_part_of_the_objective():
    records = [
        record(0, 0, 100, 110, 120),
        record(1, 0, 300, 310, 320),
        record(2, 0, 100, 110, 400),
        record(3, 0, error="QUEUE_FULL"),
    ]
    figures = figures_of(Measurement(records), Extent(seconds=1.0), Objective(ttft_ms=200, itl_ms=50))
    assert figures["goodput_per_second"] == 1.0
    assert figures["attainment"] == 0.25
    assert figures["errors"] == {"QUEUE_FULL": 1}
    assert figures_of(Measurement(records), Extent(seconds=1.0), Objective(tpot_ms=50))["attainment"] == 0.5


def test_objectives_are_given_in_seconds():
    assert parse_objective("ttft=0.2,itl=0.05") == Objective(ttft_ms=200.0, itl_ms=50.0)
    for text in ("", "ttft", "ttft=fast", "speed=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_objective(text)


def test_a_run_that_the_generator_spoilt_is_void():
    records = [record(0, 0, 10, 20)]
    assert figures_of(Measurement(records, [100] * 100), Extent(seconds=1), Objective())["void"] == []
    (late,) = figures_of(Measurement(records, [100] * 50 + [20_000] * 50), Extent(seconds=1), Objective())["void"]
    assert "late" in late
    records[0].cached_tokens = 16
    (cached,) = figures_of(Measurement(records), Extent(seconds=1), Objective())["void"]
    assert "cache" in cached


def test_what_an_unfinished_request_saw_is_counted_as_latency_and_as_error():
    records = [record(0, 0, 10, 20), record(1, 0, 900, 990, error="UNFINISHED"), record(2, 0, 5, error="WORKER_LOST")]
    figures = figures_of(Measurement(records), Extent(seconds=1), Objective(ttft_ms=2000))
    assert (figures["ttft_p50_ms"], figures["ttft_p99_ms"]) == (455, 900)
    assert (figures["attainment"], figures["errors"]) == (1 / 3, {"UNFINISHED": 1, "WORKER_LOST": 1})


def test_a_load_of_failures_only_has_no_latencies_and_is_void():
    figures = figures_of(Measurement([record(0, 0, error="HTTP 500")]), Extent(seconds=1), Objective(ttft_ms=1))
    assert figures["ttft_p50_ms"] is None and figures["itl_max_ms"] is None
    assert figures["void"] == ["no request succeeded"]


def test_percentiles_are_values_that_occurred():
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, each) for each in (1, 90, 99, 100)] == [1, 90, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_ratios_above_one_mean_that_we_are_ahead():
    ours, other = {"ttft_p50_ms": 20.0, "requests_per_second": 30.0}, {"ttft_p50_ms": 40.0, "requests_per_second": 15.0}
    assert better_by("ttft_p50_ms", ours, other) == 2.0
    assert better_by("requests_per_second", ours, other) == 2.0
    assert better_by("ttft_p50_ms", ours, {"ttft_p50_ms": None}) is None


def test_measurements_travel_as_json():
    measurement = Measurement([record(0, 0, 10, 20)], [5])
    again = Measurement.from_json(measurement.to_json())
    assert again == measurement
    assert len(Measurement.together([measurement, again]).records) == 2

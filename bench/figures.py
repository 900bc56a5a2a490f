"""From records to figures. Pure."""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.loads import Extent
from bench.records import UNFINISHED, Measurement, Record

Figures = Mapping[str, Any]

# A run whose own sending was later than this tells of the generator and not of the server.
LATEST_MS = 5.0


@dataclass(frozen=True)
class Objective:
    """A service-level objective in milliseconds: a request meets it if its TTFT, its TPOT and the 99th percentile of its
    inter-token gaps are not above. None: not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None

    def met_by(self, record: Record) -> bool:
        gaps = record.gaps_ms
        seen = (record.ttft_ms, record.tpot_ms, percentile(gaps, 99) if gaps else None)
        wanted = (self.ttft_ms, self.tpot_ms, self.itl_ms)
        return all(most is None or value is None or value <= most for value, most in zip(seen, wanted, strict=True))


def parse_objective(text: str) -> Objective:
    """`ttft=0.2,itl=0.05`, in seconds."""
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        return Objective(**{f"{name.strip()}_ms": 1e3 * float(value) for name, value in parts.items()})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like ttft=0.2,tpot=0.02,itl=0.05, in seconds") from error


@dataclass(frozen=True)
class Window:
    """The counted part of a load, in microseconds after its beginning."""

    begin_us: float
    end_us: float

    @classmethod
    def of(cls, extent: Extent, records: Sequence[Record]) -> "Window":
        """Between warm-up and the last sending if time ends the load; else until the last token."""
        begin_us = extent.warmup_s * 1e6
        if extent.seconds:
            return cls(begin_us, extent.seconds * 1e6)
        begin_us = min((record.sent_us for record in records if record.sent_us >= begin_us), default=begin_us)
        return cls(begin_us, max((moment for record in records for moment in record.arrivals_us[-1:]), default=begin_us) + 1)

    @property
    def seconds(self) -> float:
        return (self.end_us - self.begin_us) / 1e6

    def has(self, moment_us: float) -> bool:
        return self.begin_us <= moment_us < self.end_us


def figures_of(measurement: Measurement, extent: Extent, objective: Objective) -> Figures:
    """Latencies are those of requests sent within the window; rates count what was complete, or came, within it. What a request
    that was cut off at the end of a load had seen by then counts too, or an overloaded server would look quick.

    `handoff` is from the first token to the second, so from the end of prefill to the end of the first decode step, as the client
    sees both; `kv_wait` is the gateway's own figure for the blocks' arrival alone.
    """
    window = Window.of(extent, measurement.records)
    sent = [record for record in measurement.records if window.has(record.sent_us)]
    good = [record for record in sent if record.ok and record.arrivals_us]
    met = sum(objective.met_by(record) for record in good)
    seen = [record for record in sent if (record.ok or record.error == UNFINISHED) and record.arrivals_us]
    return {
        "requests": len(sent),
        **_rates(measurement.records, window),
        **_latencies(seen),
        **_phases(good),
        "goodput_per_second": met / window.seconds,
        "attainment": met / len(sent) if sent else None,
        "errors": dict(Counter(record.error for record in sent if record.error)),
        **_generator(measurement, sent),
    }


def _rates(records: Sequence[Record], window: Window) -> Figures:
    num_complete = sum(record.ok and window.has(record.arrivals_us[-1]) for record in records if record.arrivals_us)
    num_tokens = sum(
        count for record in records for moment, count in zip(record.arrivals_us, record.counts, strict=True) if window.has(moment)
    )
    return {"requests_per_second": num_complete / window.seconds, "output_tokens_per_second": num_tokens / window.seconds}


def _latencies(records: Sequence[Record]) -> Figures:
    gaps = [gap for record in records for gap in record.gaps_ms]
    tpot = [value for record in records if (value := record.tpot_ms) is not None]
    handoff = [record.gaps_ms[0] for record in records if len(record.arrivals_us) > 1]
    return {
        **_percentiles("ttft", (record.ttft_ms for record in records), (50, 90, 99)),
        **_percentiles("tpot", tpot, (50, 99)),
        **_percentiles("itl", gaps, (50, 99)),
        "itl_max_ms": max(gaps, default=None),
        **_percentiles("handoff", handoff, (50, 99)),
    }


def _phases(records: Sequence[Record]) -> Figures:
    """What only a server tells that says where time went. `prefill_tokens_per_second`: prompt tokens over the prefill phase."""
    telling = [record for record in records if record.phases_us]
    waits = [(record.phases_us["handoff_us"] + record.phases_us["decode_queue_us"]) / 1e3 for record in telling]
    speeds = [record.prompt_tokens * 1e6 / max(1, record.phases_us["prefill_us"]) for record in telling]
    return {
        **_percentiles("kv_wait", waits, (50, 99)),
        "prefill_tokens_per_second": statistics.median(speeds) if speeds else None,
        "cached_prompt_tokens": sum(record.cached_tokens for record in records),
    }


def _generator(measurement: Measurement, sent: Sequence[Record]) -> Figures:
    """How late the sending processes were; `void` says why the figures tell nothing of the server."""
    lag = percentile(measurement.lags_us, 99) / 1e3 if measurement.lags_us else 0.0
    late = percentile([record.late_us for record in sent], 99) / 1e3 if sent else 0.0
    void = []
    if max(lag, late) > LATEST_MS:
        void.append(f"the load generator was {max(lag, late):.0f} ms late; give it more processes (--processes)")
    if any(record.cached_tokens for record in sent):
        void.append("prompts came from a prefix cache")
    if not any(record.ok for record in sent):
        void.append("no request succeeded")
    return {
        "generator_lag_p99_ms": lag,
        "generator_lag_max_ms": max(measurement.lags_us, default=0) / 1e3,
        "generator_late_p99_ms": late,
        "void": void,
    }


def _percentiles(name: str, values: Iterable[float], percents: Sequence[int]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {f"{name}_p{percent}_ms": percentile(ordered, percent) if ordered else None for percent in percents}


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` % of all do not exceed; 50 is the usual median, which may be between two values."""
    if percent == 50:
        return statistics.median(values)
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]

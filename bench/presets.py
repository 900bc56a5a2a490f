"""Sets of loads that belong to a page of figures, with the goals beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import Objective
from bench.loads import ClosedLoop, Extent, Load, PoissonArrivals


@dataclass(frozen=True)
class Goal:
    """`figure` of `load` is to be at most that many milliseconds. `peer`: what the best other server reached, for people."""

    load: str
    figure: str
    at_most: float | None
    peer: str


@dataclass(frozen=True)
class Preset:
    """Loads, how much of each, the objective for goodput, and goals."""

    loads: Sequence[Load]
    extent: Extent
    objective: Objective
    goals: Sequence[Goal]


def _closed(streams: int) -> ClosedLoop:
    return ClosedLoop(1024, 128, streams)


def _poisson(rate: float) -> PoissonArrivals:
    return PoissonArrivals(1024, 128, rate)


# One prefill and one decode worker on two H200; the peer is vLLM 0.26 there, its best set-up for each figure.
PERFORMANCE_PAGE = Preset(
    loads=(_closed(1), *(_poisson(rate) for rate in (20, 30, 40, 50)), _closed(64), _closed(128)),
    extent=Extent(seconds=20.0, warmup_s=3.0),
    objective=Objective(ttft_ms=200.0, itl_ms=25.0),
    goals=(
        Goal(_closed(1).name, "ttft_p50_ms", None, "27.5 two replicas, 46.4 split"),
        Goal(_closed(1).name, "tpot_p50_ms", None, "4.8"),
        Goal(_closed(1).name, "handoff_p50_ms", 6.0, "19.6 over NIXL"),
        Goal(_poisson(20).name, "ttft_p50_ms", 33.0, "33 two replicas, 72 split"),
        Goal(_poisson(20).name, "itl_p99_ms", 7.5, "8.5 split, 13.0 two replicas"),
        Goal(_poisson(30).name, "ttft_p50_ms", 45.0, "34 two replicas, 89 split"),
        Goal(_poisson(30).name, "itl_p99_ms", 7.5, "14.1 two replicas"),
        Goal(_poisson(30).name, "handoff_p50_ms", 10.0, "42 over NIXL"),
        Goal(_poisson(40).name, "ttft_p50_ms", None, "37 two replicas, 130 split"),
        Goal(_poisson(40).name, "itl_p99_ms", None, "15.2 two replicas"),
        Goal(_poisson(50).name, "ttft_p50_ms", None, "45 two replicas"),
        Goal(_poisson(50).name, "itl_p99_ms", None, "39 two replicas"),
        Goal(_closed(64).name, "requests_per_second", None, "41.8 two replicas, 35.5 split"),
        Goal(_closed(64).name, "itl_p99_ms", None, "17 two replicas, 59 split"),
        Goal(_closed(128).name, "requests_per_second", None, "50.9 two replicas, 38.5 split"),
        Goal(_closed(128).name, "itl_p99_ms", None, "59 split"),
    ),
)

PRESETS = {"performance-page": PERFORMANCE_PAGE}

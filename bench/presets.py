"""Sets of loads that belong to a page of figures, with the goals beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.figures import Objective
from bench.loads import ClosedLoop, Extent, Load, PoissonArrivals


@dataclass(frozen=True)
class Goal:
    """`figure` of `load` is to be at most that many milliseconds, or at least that rate. `peer`: the best other one, for people."""

    load: str
    figure: str
    at_most: float | None
    peer: str
    at_least: float | None = None

    @property
    def limit(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def missed_by(self, measured: float) -> float | None:
        """The fraction of the goal that is lacking, 0 if it is reached; None without a goal."""
        if self.at_least is not None:
            return max(0.0, 1 - measured / self.at_least)
        return None if self.at_most is None else max(0.0, measured / self.at_most - 1)


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

# SmolLM2-135M on two cores with AVX-512 and VNNI, where the peers were measured. On other processors only ratios tell.
CPU = Preset(
    loads=(ClosedLoop(256, 128, 1), ClosedLoop(256, 128, 16), ClosedLoop(1024, 64, 1), ClosedLoop(1024, 64, 16)),
    extent=Extent(),
    objective=Objective(),
    goals=(
        Goal(ClosedLoop(256, 128, 1).name, "output_tokens_per_second", None, "67.6 llama.cpp Q4_0", at_least=90.0),
        Goal(ClosedLoop(256, 128, 1).name, "ttft_p50_ms", 200.0, "254 OpenVINO"),
        Goal(ClosedLoop(256, 128, 16).name, "output_tokens_per_second", None, "228 OpenVINO", at_least=300.0),
        Goal(ClosedLoop(256, 128, 16).name, "ttft_p50_ms", 2000.0, "3,300 OpenVINO"),
        Goal(ClosedLoop(1024, 64, 1).name, "ttft_p50_ms", 800.0, "1,103 OpenVINO"),
        Goal(ClosedLoop(1024, 64, 16).name, "output_tokens_per_second", None, "41 OpenVINO", at_least=60.0),
        Goal(ClosedLoop(1024, 64, 16).name, "ttft_p50_ms", 9000.0, "18,000 OpenVINO"),
        Goal(ClosedLoop(1024, 64, 16).name, "itl_p99_ms", 250.0, "-"),
    ),
)

CPU_STEPS: Mapping[str, tuple[float, str]] = {
    "decode 1": (120.0, "107.6 llama-bench Q4_0"),
    "decode 16": (450.0, "-"),
    "prefill 512": (2000.0, "617 llama-bench Q4_0"),
    "prefill 2048": (1500.0, "380 llama-bench Q4_0"),
}
"""Steps alone on the same machine: tokens a second that are wanted, and the best other one."""

PRESETS = {"performance-page": PERFORMANCE_PAGE, "cpu": CPU}

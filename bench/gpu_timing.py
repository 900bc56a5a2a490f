"""Times work on a GPU, and measures the two ceilings that every figure is a fraction of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches with the simplest work there is."""

    read_gb_s: float
    """Summing a tensor far larger than the cache."""
    copy_gb_s: float
    """Bytes read plus bytes written."""
    bf16_tflop_s: float
    """A matrix product of 8,192 cubed on random values, by the library."""


def need_gpu() -> None:
    """SystemExit where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("this program times a GPU, and torch finds none here (`tandem doctor` says why)")


def median_us(calls: Sequence[Call], repeats: int = 15, target_us: float = 2_000.0) -> float:
    """Median time of one of `calls`, captured in a graph and replayed, so that the host's launching costs nothing.

    Give several calls over different memory where one's data would stay in the cache.
    """
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _elapsed_us(calls[0])
    times = max(1, min(50, int(target_us / max(once, 2.0) / len(calls))))
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    return statistics.median(_elapsed_us(graph.replay) for _ in range(repeats)) / (times * len(calls))


def measure_ceilings() -> Ceilings:
    """Takes about a second and 6 GB."""
    big = torch.randint(-(1 << 30), 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda").view(torch.float32).nan_to_num_(0.0)
    other = torch.empty_like(big)
    num_bytes = big.numel() * 4
    read = median_us([partial(torch.sum, big)], repeats=9)
    copy = median_us([partial(other.copy_, big)], repeats=9)
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = median_us([partial(torch.mm, left, right)], repeats=15, target_us=20_000)
    return Ceilings(num_bytes / read / 1e3, 2 * num_bytes / copy / 1e3, 2 * 8192**3 / product / 1e6)


def _elapsed_us(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3

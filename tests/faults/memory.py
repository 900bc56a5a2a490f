"""Whether the memory of processes stays flat: the part of invariant I8 that can be told from what a run saw."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROWTH_MIB = 1.0
"""Per 1,000 requests."""
WARM_UP_REQUESTS = 2000
"""What a process gains until then is not judged: caches fill up to their bounds (2,000 spans are remembered), and allocators keep
what the busiest moment needed. Of a long life the first third is not judged either, so that the longer a run the surer its word."""
MEASURED_REQUESTS = 4000
"""Fewer tell a leak of the allowed size no more from what is allocated once, such as 2 MB while others were frozen."""
MORE_AT_ONCE = 100
"""Than ever before: from then on memory is judged anew. Each request that runs takes some 20 KB in the gateway, and what they took
at the busiest moment allocators keep."""
SOAK_REQUESTS = 7000
"""A run of so many in which nobody's memory could be judged is void."""
BIN_REQUESTS = 50
"""Of each such stretch the least counts. What runs at the same time comes and goes; what leaks stays."""
FEWEST_POINTS = 10


@dataclass(frozen=True)
class Sample:
    """A process's memory when so many requests had ended in the suite, and so many ran."""

    name: str
    pid: int
    requests: int
    rss_bytes: int
    running: int = 0


@dataclass(frozen=True)
class Growth:
    """How one process's memory went on after its warm-up. `mib_per_1000` None: it lived through too few requests to tell."""

    name: str
    pid: int
    requests_lived: int
    mib_per_1000: float | None


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of every process that there are samples of, in the order of their first ones."""
    lives: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        lives.setdefault((sample.name, sample.pid), []).append(sample)
    return [
        Growth(name, pid, life[-1].requests - life[0].requests, _slope(_floor(_judged(life))))
        for (name, pid), life in lives.items()
    ]


def _judged(life: Sequence[Sample]) -> Sequence[Sample]:
    """The part after the warm-up."""
    born, end, most = life[0].requests, life[-1].requests, max(sample.running for sample in life)
    busy = next(sample.requests for sample in life if sample.running >= most - MORE_AT_ONCE)
    begin = max(busy, born + max(WARM_UP_REQUESTS, (end - born) // 3))
    return [sample for sample in life if sample.requests >= begin]


def _floor(part: Sequence[Sample]) -> list[tuple[float, float]]:
    """Thousands of requests, and the least MiB around there."""
    least: dict[int, tuple[float, float]] = {}
    for sample in part:
        point = (sample.requests / 1000, sample.rss_bytes / 2**20)
        place = sample.requests // BIN_REQUESTS
        least[place] = min(least.get(place, point), point, key=lambda each: each[1])
    return list(least.values())


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The median over all pairs of points (Theil and Sen): what happens once does not count, what goes on does.

    None if the points lie too close together to mean anything.
    """
    if len(points) < FEWEST_POINTS or 1000 * (points[-1][0] - points[0][0]) < MEASURED_REQUESTS:
        return None
    return statistics.median((y - before) / (x - earlier) for (earlier, before), (x, y) in itertools.combinations(points, 2))

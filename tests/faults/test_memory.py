"""A leak is told from a warm-up, over series as real processes give them."""

import math
import random
from collections.abc import Callable, Iterable

import pytest

from tests.faults.memory import MAX_GROWTH_MIB, MEASURED_REQUESTS, SOAK_REQUESTS, WARM_UP_REQUESTS, Growth, Sample, growths
from tests.faults.oracle import Record, Run, judge

Series = Callable[[int], float]
"""MiB after so many requests."""


def samples_of(series: Series, requests: Iterable[int], name: str = "decode-0", pid: int = 7) -> list[Sample]:
    return [Sample(name, pid, number, round(series(number) * 2**20)) for number in requests]


def life(series: Series, last: int = 8000, first: int = 0) -> list[Sample]:
    """One sample every second or so; what runs at the time comes on top, now nothing, now much."""
    chance = random.Random(3)
    return samples_of(lambda number: series(number) + max(0.0, chance.uniform(-10, 10)), range(first, last, 13))


def growth(samples: list[Sample]) -> float | None:
    (found,) = growths(samples)
    return found.mib_per_1000


def warming(number: int) -> float:
    """13 MiB more in the end, most of it over the first 4,000 requests."""
    return 192 + 13 * (1 - math.exp(-number / 1500))


def steps(number: int) -> float:
    """An allocator that takes 1 MiB at a time, ever less often."""
    return math.ceil(warming(number))


@pytest.mark.parametrize("series", [warming, steps, lambda number: 192 + min(number, 3900) / 300])
def test_a_plateau_is_no_leak(series: Series) -> None:
    found = growth(life(series))
    assert found is not None and abs(found) < 0.6 * MAX_GROWTH_MIB


@pytest.mark.parametrize("base", [lambda number: 0.0, warming, steps])
@pytest.mark.parametrize("last", [6500, 8000, 20_000])
def test_a_leak_is_found_behind_a_warm_up(base: Series, last: int) -> None:
    found = growth(life(lambda number: base(number) + 1.5 * number / 1000, last))
    assert found is not None and found > MAX_GROWTH_MIB


def test_a_leak_that_the_first_half_hid_is_found() -> None:
    """Memory that an early peak left free is used up first."""
    found = growth(life(lambda number: 200 + max(0.0, 1.5 * (number - 4000) / 1000)))
    assert found is not None and found > MAX_GROWTH_MIB


@pytest.mark.parametrize("at", range(1000, 8000, 500))
def test_what_is_allocated_once_is_no_leak(at: int) -> None:
    """As when a worker took over from one that was frozen."""
    found = growth(life(lambda number: 198 + 0.2 * number / 1000 + 3 * (number > at)))
    assert found is not None and found < MAX_GROWTH_MIB


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_a_leak_in_steps_is_found(step: float) -> None:
    found = growth(life(lambda number: 198 + step * (1.5 * number / 1000 // step)))
    assert found is not None and found > MAX_GROWTH_MIB


def test_a_leak_of_the_allowed_size_is_none() -> None:
    assert growth(life(lambda number: 200 + 0.8 * number / 1000)) == pytest.approx(0.8, abs=0.1)


def crowded(series: Series, running: Callable[[int], int], last: int = 8000) -> list[Sample]:
    """Each request that runs takes 20 KB, and what the busiest moment took stays taken."""
    found, most = [], 0
    for number in range(0, last, 13):
        most = max(most, running(number))
        found.append(Sample("gateway", 7, number, round(series(number) * 2**20) + 20_000 * most, running(number)))
    return found


def overload(until: int) -> Callable[[int], int]:
    """Ever more requests run, until so many have ended; then it is over, with a few left."""
    return lambda number: number // 10 if number < until else 20 + number % 30


def test_what_ever_more_requests_take_at_once_is_no_leak() -> None:
    found = growth(crowded(lambda number: 200.0, overload(3500)))
    assert found is not None and abs(found) < 0.3


def test_a_leak_is_found_behind_an_overload() -> None:
    found = growth(crowded(lambda number: 200 + 1.5 * number / 1000, overload(3500)))
    assert found is not None and found > MAX_GROWTH_MIB


def test_a_load_that_grows_to_the_end_tells_nothing() -> None:
    assert growth(crowded(lambda number: 200.0, overload(8000))) is None


def test_a_short_life_is_not_judged() -> None:
    shortest = WARM_UP_REQUESTS + MEASURED_REQUESTS
    short = samples_of(lambda number: number, range(0, shortest - 10, 10))
    assert growths(short) == [Growth("decode-0", 7, shortest - 20, None)]
    assert growth(samples_of(lambda number: number, range(0, shortest + 100, 10))) is not None


def test_few_samples_are_not_judged() -> None:
    assert growth(samples_of(lambda number: number, range(0, 8000, 1000))) is None


def test_processes_in_one_place_are_told_apart() -> None:
    """Each begins its life anew, when so many requests had ended already."""
    samples = samples_of(warming, range(0, 7000, 10), pid=1) + samples_of(
        lambda number: 300 + (number - 7000) / 500, range(7000, 14_000, 10), pid=2
    )
    one, other = growths(samples)
    assert (one.pid, one.requests_lived, other.pid, other.requests_lived) == (1, 6990, 2, 6990)
    assert one.mib_per_1000 is not None and one.mib_per_1000 < MAX_GROWTH_MIB
    assert other.mib_per_1000 == pytest.approx(2.0, abs=0.1)


def test_a_soak_in_which_no_memory_could_be_judged_is_void() -> None:
    def void(num_records: int, samples: list[Sample]) -> bool:
        records = [Record(number, "bad", 2, 10.0, None, code="INVALID_ARGUMENT") for number in range(num_records)]
        load = judge(Run(records=records, samples=samples))[-1]
        return "memory" in load.detail

    lives = [sample for pid in range(5) for sample in samples_of(warming, range(1000 * pid, 1000 * pid + 900, 10), pid=pid)]
    assert void(SOAK_REQUESTS, lives)
    assert not void(SOAK_REQUESTS - 1, lives)
    assert not void(SOAK_REQUESTS, [*lives, *samples_of(warming, range(0, SOAK_REQUESTS, 10), "gateway")])

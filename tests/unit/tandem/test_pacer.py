"""When the next step is launched while one is running."""

import pytest

from tandem.pacer import Pacer
from tests.fakes.clock import Clock


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(clock, clock.sleep)


def run(pacer: Pacer, clock: Clock, seconds: float, size: float = 1, cost: float = 0.001) -> None:
    """Launches a step and sees it through."""
    began = pacer.now()
    clock.now += cost
    pacer.launched(began, size)
    clock.now += seconds
    pacer.landed()


def test_nothing_is_waited_for_where_nothing_runs_or_nothing_is_known(pacer: Pacer, clock: Clock) -> None:
    pacer.pause()
    pacer.launched(pacer.now(), 1)
    pacer.pause()
    assert clock.slept == []


def test_the_next_step_is_launched_as_the_one_before_it_nears_its_end(pacer: Pacer, clock: Clock) -> None:
    run(pacer, clock, 0.006)
    pacer.launched(pacer.now(), 1)
    began = clock.now
    pacer.pause()
    assert 0.006 - 0.0015 - 0.0005 < clock.now - began < 0.006 - 0.001, "with time for a launch left"


def test_steps_in_a_row_are_measured_from_end_to_end(pacer: Pacer, clock: Clock) -> None:
    """The second waits on the device for the first; what counts is how long it ran."""
    run(pacer, clock, 0.010)
    pacer.launched(pacer.now(), 1)
    clock.now += 0.008
    pacer.launched(pacer.now(), 1)
    clock.now += 0.002
    pacer.landed()
    assert pacer.pause_s() == pytest.approx(0.010, abs=0.002)
    clock.now += 0.010
    pacer.landed()
    assert pacer.pause_s() == 0


def test_time_goes_with_size(pacer: Pacer, clock: Clock) -> None:
    run(pacer, clock, 0.020, size=1000)
    pacer.launched(pacer.now(), 2000)
    assert pacer.pause_s() == pytest.approx(0.040, abs=0.002)


def test_the_quickest_of_late_steps_is_believed(pacer: Pacer, clock: Clock) -> None:
    """A step that was delayed must not make the next ones wait beyond their end."""
    for seconds in (0.005, 0.050, 0.006):
        run(pacer, clock, seconds)
    pacer.launched(pacer.now(), 1)
    assert pacer.pause_s() < 0.005


def test_a_launch_may_take_as_long_as_the_slow_ones_but_for_the_slowest(pacer: Pacer, clock: Clock) -> None:
    for number in range(40):
        run(pacer, clock, 0.010, cost=0.005 if number == 7 else 0.002 if number % 8 == 0 else 0.001)
    pacer.launched(pacer.now(), 1)
    assert 0.010 - 0.0025 < pacer.pause_s() < 0.010 - 0.002


def test_slow_launches_are_forgotten(pacer: Pacer, clock: Clock) -> None:
    for cost in (*[0.005] * 40, *[0.001] * 40):
        run(pacer, clock, 0.010, cost=cost)
    pacer.launched(pacer.now(), 1)
    assert pacer.pause_s() > 0.008


def test_a_step_in_which_the_process_was_stopped_does_not_hold_up_the_next(pacer: Pacer, clock: Clock) -> None:
    run(pacer, clock, 6.0)
    pacer.launched(pacer.now(), 1)
    pacer.pause()
    assert sum(clock.slept) <= 0.25

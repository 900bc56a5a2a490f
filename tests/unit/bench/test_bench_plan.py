"""What the command line asks for."""

import pytest

from bench.figures import Objective
from bench.loads import ClosedLoop, Extent, PoissonArrivals
from bench.presets import PERFORMANCE_PAGE
from bench.serve import parse_arguments, plan


def test_a_preset_brings_loads_time_and_objective():
    loads, extent, objective = plan(parse_arguments(["--preset", "performance-page"]))
    assert {load.rate for load in loads if isinstance(load, PoissonArrivals)} == {20, 30, 40, 50}
    assert {load.streams for load in loads if isinstance(load, ClosedLoop)} == {1, 64, 128}
    assert (extent, objective) == (PERFORMANCE_PAGE.extent, PERFORMANCE_PAGE.objective)


def test_what_is_said_goes_before_the_preset():
    arguments = ["--preset", "performance-page", "--seconds", "5", "--warmup", "0", "--slo", "ttft=1", "--loads", "8/8/2"]
    assert plan(parse_arguments(arguments)) == ([ClosedLoop(8, 8, 2)], Extent(5.0, 0, 0.0), Objective(ttft_ms=1000.0))
    assert plan(parse_arguments(["--preset", "performance-page", "--requests", "9"]))[1] == Extent(0.0, 9, 0.0)


def test_goals_are_of_loads_and_figures_that_exist():
    names = {load.name for load in PERFORMANCE_PAGE.loads}
    assert {goal.load for goal in PERFORMANCE_PAGE.goals} <= names


def test_contradictions_are_refused():
    with pytest.raises(SystemExit):
        plan(parse_arguments(["--seconds", "2", "--warmup", "2"]))
    with pytest.raises(SystemExit):
        parse_arguments(["--beside"])

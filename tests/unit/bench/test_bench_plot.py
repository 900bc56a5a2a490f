"""The plot is drawn for every mix of loads and servers."""

import pytest

from bench.figures import Objective, figures_of
from bench.loads import ClosedLoop, Extent, PoissonArrivals
from bench.plot import write_plot
from bench.records import Measurement, Record

FIGURES = figures_of(Measurement([Record(0, 8, 0, 0, [10, 20], [1, 1], 2)]), Extent(seconds=1), Objective())
NOTHING = figures_of(Measurement([Record(0, 8, 0, error="HTTP 500")]), Extent(seconds=1), Objective())
LOADS = [ClosedLoop(8, 2, 1), ClosedLoop(8, 2, 4), ClosedLoop(64, 2, 1), PoissonArrivals(8, 2, 5)]


@pytest.mark.parametrize(("loads", "servers"), [(LOADS, ["tandem", "openai"]), (LOADS[3:], ["tandem"])])
def test_a_picture_is_written(tmp_path, loads, servers):
    pytest.importorskip("matplotlib")
    rows = {load.name: FIGURES for load in loads}
    assert write_plot(tmp_path / "serve.png", {server: rows for server in servers}, loads, Objective(ttft_ms=5.0))
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_loads_without_any_answer_leave_gaps(tmp_path):
    pytest.importorskip("matplotlib")
    assert write_plot(tmp_path / "serve.png", {"tandem": {load.name: NOTHING for load in LOADS}}, LOADS, Objective())

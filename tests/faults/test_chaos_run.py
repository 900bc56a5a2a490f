"""`make chaos`, short: the whole way from the trace to the verdict, with a few faults."""

from pathlib import Path

import pytest

from tests.faults.injector import plan_of
from tests.faults.members import Shape
from tests.faults.oracle import judge
from tests.faults.run import Runner, Settings
from tests.faults.suite import Suite
from tests.faults.verdict import client_errors, wrong_tokens


@pytest.mark.timeout(180)
async def test_workers_die_under_a_trace_and_no_client_sees_it(tmp_path: Path) -> None:
    settings = Settings(30.0, seed=1, shape=Shape(), plan=plan_of(["kill"], most=3))
    async with Suite(settings.shape, tmp_path, proxied=True) as suite:
        run = await Runner(settings, suite).run()
    assert len(run.faults) == 3
    assert client_errors(run) == []
    assert wrong_tokens(run) == 0
    assert [verdict for verdict in judge(run) if verdict.held is False] == []

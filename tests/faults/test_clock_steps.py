"""C4: wall clocks jump by an hour, each process's for itself, while requests run. No lease, deadline or detection takes notice."""

from pathlib import Path

import pytest

from tests.faults.clock import WallClocks, compiler
from tests.faults.conftest import Patient
from tests.faults.members import Shape
from tests.faults.suite import Suite
from tests.faults.traffic import Client

HOUR_S = 3600
# Slow enough that at any moment some requests wait in the gateway, some are prefilled under a lease, and some are decoded.
SHAPE = Shape(step_ms=8.0, token_us=1000.0, flags={"gateway": ("--max-running", "8")})


@pytest.mark.timeout(120)
@pytest.mark.skipif(compiler() is None, reason="the stepped clock is built here, and there is no C compiler")
async def test_c4_wall_clocks_that_jump_misfire_nothing(tmp_path: Path) -> None:
    clocks = WallClocks(tmp_path)
    async with Suite(SHAPE, tmp_path / "suite", environment=clocks.environment) as suite:
        assert suite.channel is not None
        patient = Patient(suite, Client(suite.channel))
        await patient.served(patient.send(8))
        births = {name: member.births for name, member in suite.members.items()}
        for direction in (1, -1, 0):
            records = patient.send(24, completion_tokens=40)
            await patient.until_flowing(records[:4])
            for number, name in enumerate(suite.members):  # neighbours jump apart
                clocks.step(suite.process(name).pid, direction * HOUR_S * (1 if number % 2 else -1))
            await patient.served([*records, *patient.send(8)])
            hasty = patient.send(4, "deadline", completion_tokens=200)
            await patient.finish(hasty)
            assert {record.code for record in hasty} == {"DEADLINE_EXCEEDED"}
            assert all(record.ended - record.began < record.deadline_s + 1.0 for record in hasty)
        await suite.wait_idle()
        view = await suite.view()
        assert (view.failover.retries, view.failover.migrations) == (0, 0)
        assert sum(worker.handoff.tickets.expired for worker in view.workers) == 0
        assert {name: member.births for name, member in suite.members.items()} == births
        assert patient.bad_lines() == []

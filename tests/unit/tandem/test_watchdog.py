"""Processes that stand still for good end, and say where they stood."""

import subprocess
import sys

import pytest

from tandem.supervisor import describe_status
from tandem.watchdog import WEDGED_STATUS

ENGINE_STANDS = "import tandem.watchdog as w; w.leave_wedged('engine for 30 s')"
LOOP_STANDS = """
import asyncio, time, tandem.watchdog as w
async def main():
    async with w.loop_guarded(0.2):
        await asyncio.sleep(0.3)  # it is alive
        time.sleep(60)
asyncio.run(main())
"""
LOOP_ENDS = """
import asyncio, time, tandem.watchdog as w
async def main():
    async with w.loop_guarded(0.2):
        await asyncio.sleep(0)
    time.sleep(0.3)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("code", "status", "said"), [(ENGINE_STANDS, WEDGED_STATUS, "engine for 30 s"), (LOOP_STANDS, 1, "Timeout"), (LOOP_ENDS, 0, "")]
)
def test_what_stands_still_ends_and_says_where(code: str, status: int, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == status
    assert said in ended.stderr
    assert ("most recent call first" in ended.stderr) == bool(status)


def test_the_supervisor_knows_the_reason() -> None:
    assert "no progress" in describe_status(WEDGED_STATUS)

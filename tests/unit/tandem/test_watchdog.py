"""Processes that stand still for good end, and say where they stood; those that were stopped go on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tandem.supervisor import describe_status
from tandem.watchdog import LOOKS, WEDGED_STATUS, LoopJudge

ENGINE_STANDS = "import tandem.watchdog as w; w.leave_wedged('engine for 30 s')"
LOOP_STANDS = """
import asyncio, time, tandem.watchdog as w
async def main():
    async with w.loop_guarded(0.2):
        await asyncio.sleep(0.3)  # it is alive
        time.sleep(60)
asyncio.run(main())
"""
NATIVE_CODE_STANDS = """
import asyncio, ctypes, tandem.watchdog as w
async def main():
    async with w.loop_guarded(0.1):
        await asyncio.sleep(0.1)
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter
asyncio.run(main())
"""
LOOP_ENDS = """
import asyncio, time, tandem.watchdog as w
w.NATIVE_FACTOR = 1
async def main():
    async with w.loop_guarded(0.2):
        await asyncio.sleep(0.1)
    time.sleep(0.4)
asyncio.run(main())
"""
STOPPED_TWICE = """
import asyncio, os, signal, tandem.watchdog as w
async def main():
    async with w.loop_guarded(0.5):
        for _ in range(2):
            await asyncio.sleep(0.1)  # watched by now
            os.kill(os.getpid(), signal.SIGSTOP)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (ENGINE_STANDS, WEDGED_STATUS, "engine for 30 s"),
        (LOOP_STANDS, WEDGED_STATUS, "event loop for 0.2 s"),
        (NATIVE_CODE_STANDS, 1, "Timeout"),
        (LOOP_ENDS, 0, ""),
    ],
)
def test_what_stands_still_ends_and_says_where(code: str, status: int, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == status
    assert said in ended.stderr
    assert ("most recent call first" in ended.stderr) == bool(status)


def test_what_was_stopped_for_longer_than_the_limit_goes_on() -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED_TWICE]) as process:
        for _ in range(2):
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            time.sleep(0.6)  # real time is what the process must not count
            process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=50) == 0


def test_a_loop_is_given_up_after_looks_and_not_after_time() -> None:
    judge = LoopJudge()
    assert not any(judge.stands(beats) for beats in range(100))
    assert [judge.stands(99) for _ in range(LOOKS)] == [False] * (LOOKS - 1) + [True]
    assert not judge.stands(100)


def test_the_supervisor_knows_the_reason() -> None:
    assert "no progress" in describe_status(WEDGED_STATUS)

"""Children that die, refuse to die, or lose their parent."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from tandem.child_process import LogFile
from tandem.supervisor import ChildFailedError, ChildSpec, RestartBudget, RestartPolicy, Supervisor, describe_status
from tests.fakes.clock import Clock

# Runs until its standard input ends, as our services do with --exit-with-parent.
PATIENT = "import sys; print('ready', flush=True); sys.stdin.read()"
MORTAL = "print('last words', flush=True); raise SystemExit(3)"
# Says its name when it is asked to stop.
POLITE = """
import signal, sys
def stop(*_):
    open(sys.argv[2], 'a').write(sys.argv[1] + '\\n')
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
print('ready', flush=True)
sys.stdin.read()
"""
STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"


class Diary:
    """An observer that lets a test wait for what happens."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, str, object]] = asyncio.Queue()
        self.past: list[tuple[str, str, object]] = []

    def started(self, name: str) -> None:
        self._note(("started", name, None))

    def line(self, name: str, line: str) -> None:
        self._note(("line", name, line))

    def died(self, name: str, status: int, restart_in_s: float) -> None:
        self._note(("died", name, status))

    def _note(self, event: tuple[str, str, object]) -> None:
        self.past.append(event)
        self.events.put_nowait(event)

    async def wait_for(self, *wanted: tuple[str, str, object]) -> None:
        """Until each of `wanted` has happened from now on, in any order."""
        missing = list(wanted)
        while missing:
            event = await self.events.get()
            if event in missing:
                missing.remove(event)


def child(name: str, program: str, *arguments: str, stop_order: int = 0) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", program, *arguments), stop_order)


def no_sleep(waits: list[float]) -> Callable[[float], Awaitable[None]]:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    return sleep


async def test_children_run_and_end_with_the_supervisor(tmp_path: Path) -> None:
    diary = Diary()
    async with Supervisor([child("a", PATIENT), child("b", PATIENT)], tmp_path, diary) as supervisor:
        await diary.wait_for(("line", "a", "ready"), ("line", "b", "ready"))
        pids = [each.pid for each in supervisor.children]
        assert all(pid is not None and psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
    assert (tmp_path / "a.log").read_text() == "ready\n"


async def test_dead_child_is_started_again_and_others_go_on(tmp_path: Path) -> None:
    diary, waits = Diary(), list[float]()
    async with Supervisor([child("a", PATIENT), child("b", PATIENT)], tmp_path, diary, sleep=no_sleep(waits)) as supervisor:
        await diary.wait_for(("line", "a", "ready"), ("line", "b", "ready"))
        victim, other = supervisor.children
        first_pid, other_pid = victim.pid, other.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        await diary.wait_for(("died", "a", -signal.SIGKILL), ("line", "a", "ready"))
        assert victim.pid not in (None, first_pid) and other.pid == other_pid
    assert waits == [0.5]


async def test_hopeless_child_ends_the_suite_with_its_last_words(tmp_path: Path) -> None:
    diary, waits = Diary(), list[float]()
    supervisor = Supervisor([child("a", PATIENT), child("bad", MORTAL)], tmp_path, diary, sleep=no_sleep(waits))
    with pytest.raises(ChildFailedError, match="bad ended with status 3") as failure:
        async with supervisor:
            await supervisor.wait_failed()
    assert waits == [0.5, 1.0, 2.0]
    assert failure.value.last_lines == ("last words",) * 4
    assert failure.value.log_path.read_text() == "last words\n" * 4
    assert [each.pid for each in supervisor.children] == [None, None]


async def test_bad_configuration_is_not_tried_twice(tmp_path: Path) -> None:
    diary = Diary()
    with pytest.raises(ChildFailedError, match="status 2"):
        async with Supervisor([child("a", "raise SystemExit(2)")], tmp_path, diary) as supervisor:
            await supervisor.wait_failed()
    assert [event for event, _, _ in diary.past].count("started") == 1


async def test_children_stop_in_order_and_at_leisure(tmp_path: Path) -> None:
    diary, record = Diary(), tmp_path / "order"
    orders = {"prefill": 2, "gateway": 0, "decode": 1}
    specs = [child(name, POLITE, name, str(record), stop_order=order) for name, order in orders.items()]
    async with Supervisor(specs, tmp_path, diary):
        await diary.wait_for(*(("line", name, "ready") for name in orders))
    assert record.read_text().split() == ["gateway", "decode", "prefill"]


async def test_child_that_ignores_the_request_is_killed_after_the_grace(tmp_path: Path) -> None:
    diary = Diary()
    async with Supervisor([child("a", STUBBORN)], tmp_path, diary, RestartPolicy(grace_s=0.05)) as supervisor:
        await diary.wait_for(("line", "a", "ready"))
        pid = supervisor.children[0].pid
    assert pid is not None and not psutil.pid_exists(pid)


async def test_a_child_is_not_started_while_the_suite_stops(tmp_path: Path) -> None:
    diary, never = Diary(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        await never.wait()

    async with Supervisor([child("a", MORTAL)], tmp_path, diary, sleep=sleep):
        await diary.wait_for(("died", "a", 3))
    assert [event for event, _, _ in diary.past].count("started") == 1


async def test_cancelling_the_suite_leaves_no_child(tmp_path: Path) -> None:
    diary, pids = Diary(), list[int | None]()

    async def suite() -> None:
        async with Supervisor([child("a", STUBBORN)], tmp_path, diary, RestartPolicy(grace_s=0.05)) as supervisor:
            await diary.wait_for(("line", "a", "ready"))
            pids.append(supervisor.children[0].pid)
            running.set()
            await supervisor.wait_failed()

    running = asyncio.Event()
    task = asyncio.create_task(suite())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pids[0] is not None and not psutil.pid_exists(pids[0])


PARENT = """
import asyncio, sys
from pathlib import Path
from tandem.supervisor import ChildSpec, Supervisor

CHILD = "import sys; pipe = open(sys.argv[1], 'w'); print('up', file=pipe, flush=True); sys.stdin.read()"

class Silent:
    def started(self, name): pass
    def line(self, name, line): pass
    def died(self, name, status, restart_in_s): pass

async def main():
    specs = [ChildSpec(name, (sys.executable, "-c", CHILD, sys.argv[1])) for name in ("a", "b")]
    async with Supervisor(specs, Path(sys.argv[2]), Silent()) as supervisor:
        await supervisor.wait_failed()

asyncio.run(main())
"""


def test_children_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pipe), str(tmp_path)])
    try:
        with pipe.open() as reader:
            assert [reader.readline(), reader.readline()] == ["up\n", "up\n"]
            parent.kill()
            parent.wait()
            # The pipe ends when the last process that holds it is gone.
            assert reader.read() == ""
    finally:
        parent.kill()
        parent.wait()


def test_budget_forgets_deaths_out_of_the_window() -> None:
    clock = Clock()
    budget = RestartBudget(RestartPolicy(max_deaths=3, window_s=60, backoff_s=(0.5, 1, 2)), clock)
    assert [budget.after_death(1) for _ in range(3)] == [0.5, 1, 2]
    clock.now += 61
    assert budget.after_death(1) == 0.5
    clock.now += 39
    assert [budget.after_death(1) for _ in range(3)] == [1, 2, None]


def test_budget_counts_a_clean_end_as_a_death() -> None:
    assert RestartBudget(RestartPolicy(max_deaths=0), Clock()).after_death(0) is None


def test_log_file_is_bounded(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", max_bytes=2000)
    for number in range(1000):
        log.write(f"line {number}")
    log.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2 and sum(sizes) < 2100
    assert log.path.read_text().endswith("line 999\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
async def test_a_child_that_talks_to_a_full_disk_goes_on(tmp_path: Path) -> None:
    diary, log_directory = Diary(), tmp_path / "logs"
    log_directory.mkdir()
    (log_directory / "talker.log").symlink_to("/dev/full")
    program = "for number in range(20_000): print('line', number, flush=True)\nraise SystemExit(2)"
    with pytest.raises(ChildFailedError) as failure:
        async with asyncio.timeout(20), Supervisor([child("talker", program)], log_directory, diary) as supervisor:
            await supervisor.wait_failed()
    assert failure.value.last_lines[-1] == "line 19999"


async def test_long_and_broken_lines_are_kept(tmp_path: Path) -> None:
    diary = Diary()
    program = "import sys; sys.stdout.buffer.write(b'x' * 200_000 + b'\\n\\xff\\nend'); sys.stdout.flush(); sys.exit(2)"
    with pytest.raises(ChildFailedError) as failure:
        async with Supervisor([child("a", program)], tmp_path, diary) as supervisor:
            await supervisor.wait_failed()
    assert failure.value.last_lines[-2:] == ("\ufffd", "end")


@pytest.mark.parametrize(
    ("status", "text"), [(1, "ended with status 1"), (-9, "was killed by SIGKILL"), (-250, "was killed by signal 250")]
)
def test_status_for_people(status: int, text: str) -> None:
    assert describe_status(status) == text

"""`tandem up` with fake services as real processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tandem.cli.plan import Member, SuitePlan
from tandem.supervisor import ChildSpec
from tests.service.cli import fake_gateway
from tests.service.cli.conftest import Cli

FAKE = str(Path(fake_gateway.__file__))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def fake_members(plan: SuitePlan) -> list[Member]:
    """The plan's processes, each replaced by the fake."""
    ports = {"gateway": plan.port, "prefill": free_port(), "decode": free_port()}
    orders = {"gateway": 0, "prefill": 2, "decode": 1}
    return [
        Member(
            ChildSpec(role, (sys.executable, FAKE, role, str(port)), orders[role]),
            f"127.0.0.1:{port}",
            fake_gateway.SERVICES[role],
        )
        for role, port in ports.items()
    ]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fakes write down their ends; commands run in this process start fakes."""
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(FAKE).parents[3],))))
    monkeypatch.setattr("tandem.cli.up.plan_members", fake_members)
    return tmp_path / "record"


def test_once_starts_answers_and_stops_in_order(cli: Cli, record: Path) -> None:
    result = cli("up", "--model", "random:tiny", "--once", "--ask", "one two", "--port", str(free_port()))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "> one two\ntwo one\n"
    for part in (
        "gateway: half way",
        "decode: serving",
        "Tandem serves fake",
        "over shm",
        "tandem generate",
        "All processes have ended",
    ):
        assert part in result.stderr
    assert [line.split()[0] for line in record.read_text().splitlines()] == ["gateway", "decode", "prefill"]


def test_once_alone_asks_a_question_of_its_own(cli: Cli, record: Path) -> None:
    result = cli("up", "--model", "random:tiny", "--once", "--port", str(free_port()))
    assert result.exit_code == 0 and "sky" in result.stdout


def test_taken_port_is_said_at_once(cli: Cli, record: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = cli("up", "--model", "random:tiny", "--port", str(listener.getsockname()[1]))
    assert result.exit_code == 1 and "--port" in result.stderr and not record.exists()


def test_unknown_model_is_said_before_anything_starts(cli: Cli, record: Path) -> None:
    result = cli("up", "--model", "random:tinny", "--port", str(free_port()))
    assert result.exit_code == 1 and "Did you mean 'random:tiny'?" in result.stderr


def test_child_that_dies_for_good_ends_the_suite(cli: Cli, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def members(plan: SuitePlan) -> list[Member]:
        good = fake_members(plan)
        bad = ChildSpec("decode", (sys.executable, "-c", "print('unknown flag'); raise SystemExit(2)"), 1)
        return [*good[:2], Member(bad, "127.0.0.1:1", fake_gateway.SERVICES["decode"])]

    monkeypatch.setattr("tandem.cli.up.plan_members", members)
    result = cli("up", "--model", "random:tiny", "--once", "--port", str(free_port()))
    assert result.exit_code == 1
    assert all(part in result.stderr for part in ("decode ended with status 2", "unknown flag", "decode.log"))


STARTER = """
import sys
from tests.service.cli.test_cli_up import fake_members
import tandem.cli.up
from tandem.cli.app import app
tandem.cli.up.plan_members = fake_members
app(sys.argv[1:])
"""


def start(record: Path, port: int) -> subprocess.Popen[str]:
    """`tandem up` as a process of its own, serving when this returns."""
    command = [sys.executable, "-c", STARTER, "up", "--model", "random:tiny", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_line(process, "Serving until Ctrl-C")
    return process


def wait_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stderr is not None
    assert any(wanted in line for line in process.stderr), f"ended without saying {wanted!r}"


def test_signal_stops_all_in_order(record: Path) -> None:
    with start(record, free_port()) as process:
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        wait_line(process, "All processes have ended")
    assert process.returncode == 0 and len(children) == 3
    assert not any(child.is_running() for child in children)
    assert [line.split()[0] for line in record.read_text().splitlines()] == ["gateway", "decode", "prefill"]


def test_killed_worker_comes_back_on_its_port(record: Path) -> None:
    with start(record, free_port()) as process:
        victim = next(child for child in psutil.Process(process.pid).children() if "decode" in child.cmdline())
        victim.kill()
        wait_line(process, "decode was killed by SIGKILL; starting it again")
        wait_line(process, "decode serves again")
        process.send_signal(signal.SIGTERM)
        wait_line(process, "All processes have ended")
    assert process.returncode == 0


def test_nothing_outlives_a_killed_tandem_up(record: Path) -> None:
    with start(record, free_port()) as process:
        children = psutil.Process(process.pid).children()
        process.kill()
        # Orphans may stay as zombies where no init process collects them.
        assert psutil.wait_procs([child for child in children if not ended(child)], timeout=30)[1] == [] or all(
            map(ended, children)
        )


def ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True

"""Commands that need no server: doctor, pull, version, help."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.app import app
from tandem.cli.devices import TorchReport, torch_report
from tandem.cli.handoff_check import HandoffReport, handoff_reports
from tandem.downloads import pinned_path
from tandem.models import PINNED_MODELS, cache_directory, resolve_model

CPU_ONLY = TorchReport(version="2.13.0", cpu_capability="AVX2", num_threads=2)
COMMANDS = ("up", "generate", "chat", "status", "pull", "doctor", "version")


def tandem(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `tandem doctor` on an empty cache, with a made-up torch, at a free port."""
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def run(*arguments: str, torch: TorchReport = CPU_ONLY) -> Result:
        monkeypatch.setattr("tandem.cli.doctor.torch_report", lambda: torch)
        return tandem("doctor", "--port", str(port), *arguments)

    return run


def line_of(result: Result, subject: str) -> str:
    return next(line for line in result.stdout.splitlines() if line[3:].strip().startswith(subject))


def test_doctor_on_a_laptop(doctor: Callable[..., Result]) -> None:
    result = doctor()
    assert result.exit_code == 0 and "Ready" in result.stdout
    assert "✓" in line_of(result, "torch on CPU") and "!" in line_of(result, "GPU")
    assert "✓" in line_of(result, "tcp") and "needs a CUDA GPU" in line_of(result, "cuda_ipc")
    assert "!" in line_of(result, "model") and "free" in line_of(result, "port")
    assert "Run `tandem pull" in " ".join(result.stdout.split()), "wherever the line ends, behind a path of any length"


def test_doctor_says_which_weights_were_chosen_and_why(doctor: Callable[..., Result], tmp_path: Path) -> None:
    files = resolve_model("random:tiny")
    (tmp_path / "formats").mkdir()
    path = tmp_path / "formats" / f"decode-{files.digest.replace(':', '-')[:40]}-machine-kernels.json"
    path.write_text('{"format": "int8", "reason": "measured"}')
    result = doctor("--model", "random:tiny")
    assert "int8: measured" in line_of(result, "decode weights")
    assert "chosen at the first start" in line_of(result, "prefill weights")
    path.write_text("{")
    assert "chosen at the first start" in line_of(doctor("--model", "random:tiny"), "decode weights")


def test_doctor_is_not_ready_with_a_model_that_does_not_exist(doctor: Callable[..., Result]) -> None:
    result = doctor("--model", "random:tinny")
    assert result.exit_code == 1 and "✗" in line_of(result, "model") and "Not ready: model." in result.stdout


def test_doctor_names_gpus(doctor: Callable[..., Result]) -> None:
    result = doctor(torch=TorchReport(version="2.11", cuda_version="13.0", cpu_capability="AVX512", gpus=("H200, 141 GiB",)))
    assert "✓" in line_of(result, "GPU 0") and "H200" in line_of(result, "GPU 0")
    assert "a CUDA GPU" not in line_of(result, "nccl")


def test_doctor_without_torch_fails(doctor: Callable[..., Result]) -> None:
    result = doctor(torch=TorchReport(error="No module named 'torch'"))
    assert result.exit_code == 1 and "✗" in line_of(result, "torch") and "Not ready: torch" in result.stdout


def test_doctor_without_a_package_fails(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cli.doctor.installed", lambda name: None if name == "gguf" else "1.0")
    result = doctor()
    assert result.exit_code == 1 and "Not ready: gguf." in result.stdout


def test_doctor_finds_a_present_model(doctor: Callable[..., Result]) -> None:
    assert "✓" in line_of(doctor("--model", "random:tiny"), "model")


def test_doctor_sees_a_taken_port(doctor: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        listener.close()
        with socket.create_server(("127.0.0.1", int(port))):
            result = doctor("--port", port)
    assert "!" in line_of(result, "port") and "--port" in line_of(result, "port")


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    report = torch_report()
    assert report.version and not report.error


def test_torch_that_cannot_be_imported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert torch_report().error == "ImportError: libtorch is missing"


def test_version_is_one_line() -> None:
    result = tandem("version")
    assert result.exit_code == 0 and result.stdout.startswith("tandem 0.") and len(result.stdout.splitlines()) == 1


def test_pull_of_random_weights_fetches_nothing() -> None:
    result = tandem("pull", "random:tiny")
    assert result.exit_code == 0 and "nothing to fetch" in result.stdout


def test_pull_of_an_unknown_model_fails_clearly() -> None:
    result = tandem("pull", "smollm2-135m-instruc")
    assert result.exit_code == 1 and "Did you mean 'smollm2-135m-instruct'?" in result.stderr


def test_pull_prints_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path))
    model = PINNED_MODELS["smollm2-135m-instruct"]
    path = pinned_path(model, cache_directory())
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(model.num_bytes)
    monkeypatch.setattr("tandem.downloads.sha256_file", lambda path: model.sha256)
    result = tandem("pull")
    assert (result.exit_code, result.stdout) == (0, f"{model.name}: {path}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = tandem(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout


@pytest.mark.parametrize("arguments", [["up", "--prefill", "0"], ["up", "--dtype", "int1"], ["generate"], ["nonsense"]])
def test_bad_options_are_status_2(arguments: list[str]) -> None:
    assert tandem(*arguments).exit_code == 2


def test_help_imports_nothing_slow() -> None:
    program = """
import sys
from tandem.cli import main
sys.argv = ["tandem", "--help"]
try:
    main()
except SystemExit:
    slow = ("torch", "grpc", "google.protobuf", "numpy", "psutil", "asyncio")
    print(*[name for name in slow if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "Commands" in done.stdout and done.stderr.split() == []


def reported(*reports: HandoffReport) -> Callable[[str, str], Iterator[HandoffReport]]:
    return lambda model, kv_dtype: iter(reports)


def test_doctor_tries_a_hand_off_only_when_asked(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cli.doctor.handoff_reports", reported(HandoffReport("shm", 32, 0.0, passed=True)))
    assert "Hand-off" not in doctor().stdout
    result = doctor("--verify-handoff")
    assert result.exit_code == 0 and "Hand-off of random:tiny" in result.stdout and "✓" in line_of(result, "shm  32 positions")


def test_doctor_fails_with_a_hand_off_that_changes_logits(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = HandoffReport("nccl2", 32, 0.25, passed=False)
    monkeypatch.setattr("tandem.cli.doctor.handoff_reports", reported(HandoffReport("shm", 32, 0.0, passed=True), bad))
    result = doctor("--verify-handoff", "--model", "random:tiny")
    assert result.exit_code == 1 and "2.5e-01" in line_of(result, "nccl2") and "Not ready: nccl2" in result.stdout


def test_a_hand_off_that_cannot_be_tried_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends without a line for any transport must not pass for one that found nothing wrong."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (report,) = handoff_reports("random:tiny")
    assert not report.passed and report.error


def test_a_prompt_from_a_closed_input_is_one_message() -> None:
    """As a shell closes it: `tandem generate - 0<&-`."""
    program = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, '-m', 'tandem.cli', 'generate', '-'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no standard input")
    assert "Traceback" not in done.stderr

"""The comparison on a CPU: which peers there are, what a goal lacks, what the floors are."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.cpu import ours, parse_arguments, peers_at
from bench.cpu_floors import Floors
from bench.cpu_report import COMPARED, CpuReport, alone, best_of
from bench.cpu_step import Figure
from bench.loads import ClosedLoop
from bench.peers import PEERS, Peer, installed, running
from bench.peers import Place as PeerPlace
from bench.presets import CPU, CPU_STEPS, Goal
from bench.process_memory import memory_of
from tandem.models import ModelFiles, resolve_model

WAYS = (
    ("first", "engine", False),
    ("second", "engine", True),
    ("third", "engine", True),
    ("other", "other", True),
    ("none", "absent", False),
)


def gguf(tmp_path: Path) -> ModelFiles:
    return ModelFiles("m", "gguf", tmp_path / "m.gguf", "digest", "digest")


def test_peers_that_are_not_installed_are_named_with_what_to_do(tmp_path, capsys, monkeypatch):
    absent = [replace(peer, installed=lambda python: False) for peer in PEERS]
    monkeypatch.setattr("bench.cpu.PEERS", tuple(absent))
    with peers_at(parse_arguments(["--output", str(tmp_path)]), gguf(tmp_path)) as found:
        assert found == []
    said = capsys.readouterr().out
    assert "left out: llama.cpp is not installed (llama-server on the PATH or pip install xllamacpp" in said
    assert "left out: OpenVINO is not installed (pip install openvino-genai" in said


def test_of_each_engine_the_first_way_that_is_there_is_taken(capsys):
    ways = [Peer(name, engine, lambda python, there=there: there, lambda place: (), "") for name, engine, there in WAYS]
    assert [peer.name for peer in installed(ways, sys.executable)] == ["second", "other"]
    assert "left out: absent" in capsys.readouterr().out


def test_a_python_that_is_not_there_is_told_at_once():
    with pytest.raises(SystemExit, match="--peer-python /no/python: there is no such program"):
        installed(PEERS, "/no/python")


def test_a_model_without_a_file_has_no_peers(tmp_path, capsys):
    with peers_at(parse_arguments([]), resolve_model("random:tiny")) as found:
        assert found == []
    assert "no peers" in capsys.readouterr().out


def test_servers_that_run_already_are_named_by_hand(tmp_path):
    arguments = parse_arguments(["--no-peers", "--openai", "vllm=http://127.0.0.1:8000"])
    with peers_at(arguments, gguf(tmp_path)) as (other,):
        assert (other.name, other.url) == ("vllm", "http://127.0.0.1:8000")


def test_a_peer_that_ends_at_once_is_told_with_its_log(tmp_path):
    peer = Peer("broken", "broken", lambda python: True, lambda place: (sys.executable, "-c", "raise SystemExit('no model')"), "")
    log = tmp_path / "broken.log"
    with (
        pytest.raises(SystemExit, match=r"broken did not start; .*broken\.log says why"),
        running(peer, PeerPlace(sys.executable, tmp_path, 1, 1), log),
    ):
        pass
    assert "no model" in log.read_text()


def test_ours_is_told_its_weights():
    assert ours(parse_arguments(["--weights", "bf16", "--up", "--threads", "2"]))[-4:] == ("--weights", "bf16", "--threads", "2")


@pytest.mark.parametrize(
    ("goal", "measured", "limit", "missed"),
    [
        (Goal("l", "f", 200.0, ""), 250.0, "<= 200", 0.25),
        (Goal("l", "f", 200.0, ""), 150.0, "<= 200", 0.0),
        (Goal("l", "f", None, "", at_least=90.0), 45.0, ">= 90", 0.5),
        (Goal("l", "f", None, "", at_least=90.0), 91.0, ">= 90", 0.0),
        (Goal("l", "f", None, ""), 1.0, "", None),
    ],
)
def test_a_goal_is_a_limit_from_above_or_below(goal, measured, limit, missed):
    assert (goal.limit, goal.missed_by(measured)) == (limit, missed)
    assert {each.load for each in CPU.goals} <= {load.name for load in CPU.loads}
    assert {"decode 1", "decode 16", "prefill 512", "prefill 2048"} == set(CPU_STEPS)


FLOORS = Floors(
    read_rate=1e9,
    rates={"fp32": 1e11, "bf16": 1e11, "int8": 2e11, "int4": 4e11},
    layer_weights=100_000_000,
    head_weights=10_000_000,
    attention_size=1_000,
    kv_size=500,
)


def test_floors_by_hand():
    assert FLOORS.decode_step_s("fp32") == pytest.approx(0.44)
    assert FLOORS.decode_step_s("int4") == pytest.approx(0.0625 + 0.010625)
    assert FLOORS.decode_step_s("int4", batch=10, context=1000) == pytest.approx(0.0625 + 0.010625 + 0.01)
    assert FLOORS.decode_step_s("fp32", batch=1000) == pytest.approx(1.1), "so many sequences take longer to compute than to read"
    assert FLOORS.prefill_s("int4", 1000) == pytest.approx(0.25 + 0.01)


def test_the_floor_of_a_load_is_its_prompts_and_its_steps():
    load = ClosedLoop(100, 11, 2)
    seconds = 2 * FLOORS.prefill_s("int8", 100) + 10 * FLOORS.decode_step_s("int4", 2, 105)
    assert FLOORS.rate(load, "int8", "int4") == pytest.approx(22 / seconds)


def figures(rate: float | None, ttft_ms: float | None) -> dict[str, Any]:
    others = dict.fromkeys(COMPARED, None)
    return {**others, "output_tokens_per_second": rate, "ttft_p50_ms": ttft_ms, "errors": {}}


def test_each_figure_is_compared_with_the_peer_that_is_best_at_it():
    rows = {"a": figures(10.0, 100.0), "b": figures(20.0, 300.0), "c": figures(None, None)}
    assert best_of("output_tokens_per_second", rows) == ("b", 20.0)
    assert best_of("ttft_p50_ms", rows) == ("a", 100.0)
    assert best_of("itl_p99_ms", rows) == ("", None)
    assert best_of("ttft_p50_ms", {"a": {**rows["a"], "errors": {"HTTP 500": 1}}}) == ("", None), "it left requests out"


def test_the_report_has_ratios_and_fractions_of_the_floor():
    load = ClosedLoop(256, 128, 1)
    rows = {"tandem": {load.name: figures(40.0, 50.0)}, "peer": {load.name: figures(20.0, 100.0)}}
    found = CpuReport(rows, {}, ("int4", "int4"), FLOORS, [], [load]).as_json()
    ratios = {line["figure"]: line["times better"] for line in found["best_peer"]}
    assert (ratios["out tok/s"], ratios["TTFT p50 ms"], ratios["ITL p99 ms"]) == (2.0, 2.0, None)
    fractions = {line["figure"]: line["fraction of the floor"] for line in found["beside_floors"]}
    assert fractions["out tok/s"] == pytest.approx(40 / FLOORS.rate(load, "int4", "int4"))


def test_steps_alone_are_beside_their_floors_and_goals():
    step = alone("decode 16", "int4", Figure("decode 16", median=40.0, least=39.0, phases={}), FLOORS, 100)
    assert (step.tokens_per_second, step.goal) == (400.0, 450.0)
    assert step.floor == pytest.approx(16 / FLOORS.decode_step_s("int4", 16, 100))
    assert alone("prefill 77", "int4", Figure("prefill 77", 1.0, 1.0, {}), FLOORS, 0).goal is None


def test_a_server_counts_with_its_children():
    program = "import sys; memory = bytearray(50_000_000); print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        own, both = memory_of(child.pid), memory_of(os.getpid())
        assert own.resident > 50e6 and own.proportional > 50e6
        assert both.resident > own.resident
    finally:
        child.communicate()

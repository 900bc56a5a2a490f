"""The comparison on a CPU: which peers there are, what a goal lacks, what the floors are."""

import sys
from pathlib import Path

import pytest

from bench.cpu import ours, parse_arguments, peers_at
from bench.cpu_floors import Floors
from bench.peers import PEERS, Peer, running
from bench.peers import Place as PeerPlace
from bench.presets import CPU, Goal
from tandem.models import ModelFiles, resolve_model


def gguf(tmp_path: Path) -> ModelFiles:
    return ModelFiles("m", "gguf", tmp_path / "m.gguf", "digest", "digest")


def test_peers_that_are_not_installed_are_named_with_what_to_do(tmp_path, capsys, monkeypatch):
    absent = [Peer(peer.name, lambda python: False, peer.command, peer.hint) for peer in PEERS]
    monkeypatch.setattr("bench.cpu.PEERS", tuple(absent))
    with peers_at(parse_arguments(["--output", str(tmp_path)]), gguf(tmp_path)) as found:
        assert found == []
    said = capsys.readouterr().out
    assert "left out: llama.cpp is not installed (llama-server on the PATH" in said and "pip install xllamacpp" in said


def test_a_model_without_a_file_has_no_peers(tmp_path, capsys):
    with peers_at(parse_arguments([]), resolve_model("random:tiny")) as found:
        assert found == []
    assert "no peers" in capsys.readouterr().out


def test_servers_that_run_already_are_named_by_hand(tmp_path):
    arguments = parse_arguments(["--no-peers", "--openai", "vllm=http://127.0.0.1:8000"])
    with peers_at(arguments, gguf(tmp_path)) as (other,):
        assert (other.name, other.url) == ("vllm", "http://127.0.0.1:8000")


def test_a_peer_that_ends_at_once_is_told_with_its_log(tmp_path):
    peer = Peer("broken", lambda python: True, lambda place: (sys.executable, "-c", "raise SystemExit('no model')"), "")
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


def test_floors_by_hand():
    floors = Floors(1e9, 1e12, layer_weights=100_000_000, head_weights=10_000_000, attention_size=1_000)
    assert floors.decode_step_s("fp32") == pytest.approx(0.44)
    assert floors.decode_step_s("int4") == pytest.approx(0.0625 + 0.01)
    assert floors.prefill_s(1000) == pytest.approx((2e11 + 2e9) / 1e12)

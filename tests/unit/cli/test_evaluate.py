"""`tandem eval`: the text, the two processes behind it, what it prints."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.app import app
from tandem.cli.corpus import find_corpus, read_corpus
from tandem.cli.terminal import CommandError


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "200"})


def test_a_text_is_found_on_every_machine(tmp_path: Path) -> None:
    assert len(find_corpus().text) > 100_000
    (tmp_path / "A").write_text("one")
    (tmp_path / "B").write_text("two")
    (tmp_path / "latest").symlink_to(tmp_path / "B")
    assert find_corpus(tmp_path, "no.such.module").text == "one\ntwo"


def test_no_text_is_said_with_advice(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no text to measure with") as raised:
        find_corpus(tmp_path, "no.such.module")
    assert "--text FILE" in raised.value.advice
    with pytest.raises(CommandError, match="cannot be read"):
        read_corpus(tmp_path / "absent")


@pytest.mark.parametrize("weights", ["int3", "", "fp32/bf16/fp32", "fp32,"])
def test_unknown_formats_are_refused(weights: str) -> None:
    result = evaluate("--weights", weights)
    assert result.exit_code == 2 and "int8" in result.stderr


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("too short")
    result = evaluate("--model", "random:tiny", "--text", str(tmp_path / "text"))
    assert result.exit_code == 1
    assert "9 tokens, fewer than a window of 512" in result.stderr


def test_formats_are_compared(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    flags = ("--model", "random:tiny", "--text", str(tmp_path / "text"), "--window", "32", "--tokens", "64", "--threads", "1")
    result = evaluate(*flags, "--weights", "bf16,fp32/bf16", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [each["weights"] for each in report["results"]] == ["bf16", "fp32/bf16"]
    assert report["tokens"] == 64 and report["text"] == "text"
    both, decode_only = report["results"]
    assert both["prefill"]["positions"] == 32 and both["decode"]["positions"] == 30
    assert both["prefill"]["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
    assert decode_only["prefill"]["divergence"] < both["prefill"]["divergence"]


def test_kv_is_kept_as_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    flags = ("--model", "random:tiny", "--text", str(tmp_path / "text"), "--window", "32", "--tokens", "64", "--threads", "1")
    divergences = []
    for kv_dtype in ("float32", "int8"):
        result = evaluate(*flags, "--weights", "fp32", "--kv-dtype", kv_dtype, "--json")
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["kv_dtype"] == kv_dtype
        divergences.append(abs(report["results"][0]["decode"]["divergence"]))
    assert divergences[0] == 0 < divergences[1]
    assert "KV in int8" in evaluate(*flags, "--weights", "fp32", "--kv-dtype", "int8").stdout


def test_a_failure_of_the_processes_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("enough " * 20)
    monkeypatch.setattr("tandem.cli.evaluate._module", lambda name: (sys.executable, "-c", "raise SystemExit('no such luck')"))
    result = evaluate("--model", "random:tiny", "--text", str(tmp_path / "text"), "--window", "32")
    assert result.exit_code == 1 and "no such luck" in result.stderr

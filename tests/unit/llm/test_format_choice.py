"""The weight format is measured and checked once on a machine, and remembered."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm.format_check import Checker, Verdict, draw_windows
from llm.format_choice import FormatChoice, kernels_name, known_choice, machine_name, pick, settle_format
from llm.remembered import remembered
from llm.runner import RunnerSettings
from llm.weight_format import WeightFormat

GOOD, BAD = Verdict(0.004, 0.006, 0.99, 0.985), Verdict(0.002, 0.03, 0.99, 0.99)


def test_a_choice_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "formats" / "prefill.json"
    measured = []

    def measure() -> FormatChoice:
        measured.append(1)
        return FormatChoice("bf16", "measured")

    assert remembered(path, known_choice, measure) == remembered(path, known_choice, measure) == FormatChoice("bf16", "measured")
    assert len(measured) == 1
    assert [file.name for file in path.parent.iterdir()] == ["prefill.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "int3", "reason": ""}', '{"format": ["fp32"], "reason": ""}'])
def test_a_damaged_memory_is_measured_again_and_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prefill.json"
    path.write_text(content)
    measured = FormatChoice("fp32", "measured")
    assert remembered(path, known_choice, lambda: measured) == measured
    assert remembered(path, known_choice, lambda: FormatChoice("bf16", "never")) == measured


def test_another_number_of_threads_is_another_machine() -> None:
    assert machine_name(1) != machine_name(2)
    assert machine_name(2) == machine_name(2)


def checked(verdicts: dict[WeightFormat, Verdict]) -> tuple[Callable[[WeightFormat], Verdict], list[WeightFormat]]:
    """A check with those results, and what it was asked about."""
    asked: list[WeightFormat] = []

    def verdict(format: WeightFormat) -> Verdict:
        asked.append(format)
        return verdicts[format]

    return verdict, asked


TIMES: dict[WeightFormat, Sequence[float]] = {"fp32": [0.4, 0.5], "bf16": [0.2, 0.3], "int8": [0.1, 0.1], "int4": [0.05, 0.1]}


@pytest.mark.parametrize(
    ("int4", "int8", "bf16", "chosen", "asked"),
    [
        (GOOD, GOOD, GOOD, "int4", ["int4"]),
        (BAD, GOOD, GOOD, "int8", ["int4", "int8"]),
        (BAD, BAD, GOOD, "bf16", ["int4", "int8", "bf16"]),
        (BAD, BAD, BAD, "fp32", ["int4", "int8", "bf16"]),
    ],
)
def test_the_narrowest_that_predicts_well_is_taken_and_no_wider_one_is_measured(
    int4: Verdict, int8: Verdict, bf16: Verdict, chosen: str, asked: Sequence[str]
) -> None:
    verdict, seen = checked({"int4": int4, "int8": int8, "bf16": bf16})
    measured: list[WeightFormat] = []

    def measure(format: WeightFormat) -> Sequence[float]:
        measured.append(format)
        return TIMES[format]

    choice = pick(measure, verdict, "at batches of 1 and 2")
    assert (choice.format, seen, measured) == (chosen, asked, ["fp32", *asked])
    assert "at batches of 1 and 2: fp32 400.0 and 500.0 ms, int4 50.0 and 100.0 ms" in choice.reason
    refused = "int4 not taken unasked: perplexity +3.00 %, 99.0 % of the likeliest tokens kept, where 1 % and 98 % are wanted"
    assert (refused in choice.reason) == (int4 is BAD)
    assert ("; against fp32: perplexity +0.60 %" in choice.reason) == (chosen != "fp32")


@pytest.mark.parametrize(
    ("verdict", "passed"),
    [
        (Verdict(0.01, 0.01, 0.98, 0.98), True),
        (Verdict(0.011, 0.0, 1.0, 1.0), False),
        (Verdict(0.0, 0.011, 1.0, 1.0), False),
        (Verdict(0.0, 0.0, 0.979, 1.0), False),
        (Verdict(0.0, 0.0, 1.0, 0.979), False),
    ],
)
def test_both_roles_must_keep_perplexity_and_likeliest_tokens(verdict: Verdict, passed: bool) -> None:
    assert verdict.passed == passed


@pytest.mark.parametrize(
    ("bf16", "chosen", "asked"), [([0.5, 0.55], "bf16", ["bf16"]), ([0.6, 0.6], "fp32", []), (None, "fp32", [])]
)
def test_what_is_slower_than_fp32_or_has_no_kernels_is_not_checked(
    bf16: Sequence[float] | None, chosen: str, asked: list[str]
) -> None:
    verdict, seen = checked({"bf16": GOOD})
    times: dict[WeightFormat, Sequence[float] | None] = {"fp32": [0.5, 0.5], "bf16": bf16}
    choice = pick(times.get, verdict, "")
    assert (choice.format, seen) == (chosen, asked)
    assert ("bf16" in choice.reason) == (bf16 is not None)


def settings(tmp_path: Path, **changes: Any) -> RunnerSettings:
    return replace(RunnerSettings("decode", threads=1, cache_directory=tmp_path), **changes)


def test_auto_is_settled_and_remembered(random_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    settled = settle_format(random_files(), settings(tmp_path), lambda fraction, text: seen.append(text))
    assert settled.told_format is not None
    assert settled.weights_reason.startswith("measured at batches of 1 and 16: fp32")
    assert "choosing the weight format: measuring int4" in seen
    monkeypatch.setattr("llm.format_choice._choose", lambda *_: pytest.fail("measured twice"))
    assert settle_format(random_files(), settings(tmp_path), lambda fraction, text: None) == settled


def test_the_kind_of_kv_has_no_part_in_it(random_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(files: Any, told: RunnerSettings, progress: Any) -> FormatChoice:
        assert told.told_kv_dtype == "bfloat16"
        return FormatChoice("int8", "measured")

    monkeypatch.setattr("llm.format_choice._choose", choose)
    settled = settle_format(random_files(), settings(tmp_path, kv_dtype="int8"), lambda fraction, text: None)
    assert (settled.weights, settled.told_kv_dtype) == ("int8", "int8")


def test_what_was_told_is_kept(random_files: Any, tmp_path: Path) -> None:
    for told in (settings(tmp_path, weights="fp32"), settings(tmp_path, dtype="bfloat16"), settings(tmp_path, device="cuda:0")):
        assert settle_format(random_files(), told, lambda fraction, text: None) is told


def test_a_model_too_large_to_check_takes_bf16(random_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.format_choice._exact_bytes", lambda files: 1 << 60)
    settled = settle_format(random_files(), settings(tmp_path), lambda fraction, text: None)
    assert settled.format_and_reason == ("bf16", "the model is too large to be compared with fp32 here")


def test_a_verdict_is_remembered_for_the_kernels_it_was_made_with(random_files: Any, tmp_path: Path) -> None:
    (tmp_path / "formats").mkdir()

    def verdict(kernels: str) -> tuple[Verdict, bool]:
        stages: list[str] = []
        with closing(Checker(random_files(), settings(tmp_path), lambda fraction, text: stages.append(text), kernels)) as checker:
            return checker.verdict("bf16"), "choosing the weight format: comparing bf16 with fp32" in stages

    found, compared = verdict("some")
    assert compared and found.passed and 0 < found.prefill_change < 1e-3 and 0 < found.decode_change < 1e-3
    assert verdict("some") == (found, False)
    assert verdict("others") == (found, True)
    assert kernels_name() == kernels_name()


def test_drawn_texts_are_the_same_at_every_call_and_differ_from_each_other(random_files: Any, tmp_path: Path) -> None:
    checker = Checker(random_files(), settings(tmp_path), lambda fraction, text: None, "some")
    pair = checker._pair(settings(tmp_path, dtype="float32"))
    windows = draw_windows(pair, 24)
    assert windows == draw_windows(pair, 24)
    assert {len(window) for window in windows} == {24}
    assert len({tuple(window[1:]) for window in windows}) == len(windows)

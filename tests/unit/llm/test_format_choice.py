"""The weight format is measured once on a machine, and remembered."""

from pathlib import Path

import pytest

from llm.format_choice import FormatChoice, machine_name, remembered_choice


def test_a_choice_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "formats" / "prefill.json"
    measured = []

    def measure() -> FormatChoice:
        measured.append(1)
        return FormatChoice("bf16", "measured")

    assert remembered_choice(path, measure) == remembered_choice(path, measure) == FormatChoice("bf16", "measured")
    assert len(measured) == 1
    assert [file.name for file in path.parent.iterdir()] == ["prefill.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "int3", "reason": ""}'])
def test_a_damaged_memory_is_measured_again_and_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prefill.json"
    path.write_text(content)
    measured = FormatChoice("fp32", "measured")
    assert remembered_choice(path, lambda: measured) == measured
    assert remembered_choice(path, lambda: FormatChoice("bf16", "never")) == measured


def test_another_number_of_threads_is_another_machine() -> None:
    assert machine_name(1) != machine_name(2)
    assert machine_name(2) == machine_name(2)

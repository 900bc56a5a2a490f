"""Where tokenizer work runs: never for long on the event loop."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.prompts import SHORT_CHARACTERS, detokenize, tokenize
from gateway.served_model import load_served_model
from tandem.models import resolve_model


@pytest.mark.parametrize(("length", "on_loop"), [(10, True), (SHORT_CHARACTERS + 1, False)])
async def test_long_work_leaves_the_event_loop(tmp_path: Path, length: int, on_loop: bool) -> None:
    threads: list[int] = []

    def note(given: str | Sequence[int], **options: bool) -> Any:
        threads.append(threading.get_ident())
        return given

    model = load_served_model(resolve_model("random:tiny"), tmp_path)
    watched = replace(model, tokenizer=SimpleNamespace(encode=note, decode=note))  # type: ignore[arg-type]
    await tokenize("x" * length, watched, add_special_tokens=True)
    await detokenize([5] * length, watched, skip_special_tokens=False)
    assert [thread == threading.get_ident() for thread in threads] == [on_loop, on_loop]

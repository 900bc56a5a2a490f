"""Whether a hand-off changes what a model computes. It is tried in a process of its own, since this one has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_TIMEOUT_S = 900.0
"""A large model takes minutes to load."""


@dataclass(frozen=True)
class HandoffReport:
    """What one transport did to the logits, or why there is nothing to say."""

    transport: str
    num_positions: int = 0
    max_deviation: float = 0.0
    error: str = ""
    passed: bool = False


def handoff_reports(model: str, kv_dtype: str = "auto") -> Iterator[HandoffReport]:
    """One for each transport; one that failed, without a transport, if it could not be tried."""
    command = [sys.executable, "-m", "decode_svc.verify_handoff", "--model", model, "--kv-dtype", kv_dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        yield HandoffReport("hand-off", error=f"took more than {_TIMEOUT_S:.0f} s")
        return
    reports = [HandoffReport(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    yield from reports
    if not reports or (done.returncode and all(report.passed for report in reports)):
        yield HandoffReport("hand-off", error=(done.stderr.strip().splitlines() or ["it ended without a word"])[-1])

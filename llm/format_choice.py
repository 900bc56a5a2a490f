"""Chooses the weight format of a CPU worker by measuring the model's own matrix shapes with made-up weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm.config import ModelConfig
from llm.ops.linear import Linear
from llm.ops.operations import Operations
from llm.weight_format import WeightFormat
from llm.weights_plan import plan_tensors

_ROWS = {"prefill": (256,), "decode": (1, 16)}
_SAMPLE_BYTES = 96 << 20
"""Float32 bytes of weights to measure with: more than caches hold, so that memory counts as it will."""
_FORMATS: Mapping[str, WeightFormat] = {"fp32": "fp32", "bf16": "bf16"}
_REPEATS = 3
_MARGIN = 1.1
"""fp32 must be this much faster to be chosen: bf16 halves memory, and two workers of one format share its pages."""


@dataclass(frozen=True)
class FormatChoice:
    """The format, and why, for people."""

    format: WeightFormat
    reason: str


def remembered_choice(path: Path, measure: Callable[[], FormatChoice]) -> FormatChoice:
    """The choice that `path` holds, else a measured one, which it holds from then on.

    So the workers of one machine agree, and start sooner. A file that cannot be read is measured again and replaced.
    """
    try:
        known = json.loads(path.read_text())
        return FormatChoice(_FORMATS[known["format"]], str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        choice = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({"format": choice.format, "reason": choice.reason}))
    written.replace(path)
    return choice


def machine_name(threads: int) -> str:
    """Names what a measurement depends on beside the model: processor, threads and torch's version."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    return hashlib.sha256(f"{processor} {threads} {torch.__version__}".encode()).hexdigest()[:16]


def choose_format(config: ModelConfig, role: str, operations: Operations) -> FormatChoice:
    """Takes a fraction of a second for small models, once the kernels are compiled."""
    rows = _ROWS[role]
    wide = _measure(config, torch.float32, rows, operations)
    narrow = _measure(config, torch.bfloat16, rows, operations)
    format: WeightFormat = "fp32" if sum(wide) * _MARGIN < sum(narrow) else "bf16"
    return FormatChoice(format, f"measured at {_join(rows)} rows: fp32 {_milliseconds(wide)} ms, bf16 {_milliseconds(narrow)} ms")


def _measure(config: ModelConfig, dtype: torch.dtype, rows: Sequence[int], operations: Operations) -> list[float]:
    """Seconds of all layers' matrix products for each number of rows, extrapolated from a few layers."""
    shapes = [item.shape for item in plan_tensors(config) if item.is_matrix and item.name.startswith("layers.0.")]
    layer_bytes = 4 * sum(out * size for out, size in shapes)
    copies = max(1, min(config.num_layers, _SAMPLE_BYTES // layer_bytes))
    products = [(operations.linear(torch.full(shape, 0.01, dtype=dtype)), shape[1]) for _ in range(copies) for shape in shapes]
    return [_time(products, count) * config.num_layers / copies for count in rows]


def _time(products: Sequence[tuple[Linear, int]], rows: int) -> float:
    inputs = {size: torch.ones(rows, size) for _, size in products}
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for product, size in products:
            product(inputs[size])
        best = min(best, time.perf_counter() - start)
    return best


def _join(rows: Sequence[int]) -> str:
    return " and ".join(map(str, rows))


def _milliseconds(seconds: Sequence[float]) -> str:
    return " and ".join(f"{1000 * value:.1f}" for value in seconds)

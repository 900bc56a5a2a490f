"""What this processor's own arithmetic and memory allow, and how near figures come to it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bench.figures import Figures
from bench.loads import ClosedLoop
from llm.config import ModelConfig, load_model_config
from llm.weights_plan import plan_tensors
from tandem.models import ModelFiles

_READ_BYTES = 400 << 20
_SIZE = 1024
_SECONDS = 0.5
_BYTES_A_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 20 / 32}
"""An int4 group of 32 is 16 bytes and two scales of two."""


@dataclass(frozen=True)
class Floors:
    """Measured: bytes read and float32 operations a second. Of the model: weights in layers and head, and attention."""

    read_bytes_per_second: float
    operations_per_second: float
    layer_weights: int
    head_weights: int
    attention_size: int
    """Layers times query size: operations of attention are 4 of these for each pair of tokens."""

    def decode_step_s(self, format: str) -> float:
        """A step of one sequence reads all weights; a head has a byte at least."""
        size = _BYTES_A_WEIGHT[format]
        return (self.layer_weights * size + self.head_weights * max(1.0, size)) / self.read_bytes_per_second

    def prefill_s(self, num_tokens: int) -> float:
        """In float32: the layers' products, and half of the square of attention."""
        operations = 2 * self.layer_weights * num_tokens + 2 * self.attention_size * num_tokens**2
        return operations / self.operations_per_second

    def print(self, rows: Mapping[str, Figures], loads: Sequence[ClosedLoop]) -> None:
        table = Table(
            title=f"Floors: {self.read_bytes_per_second / 1e9:.1f} GB/s read, {self.operations_per_second / 1e9:.0f} GFLOP/s"
        )
        for heading in ("load: in/out tokens", "figure", "floor", "measured", "measured / floor"):
            table.add_column(heading, justify="left" if heading.startswith(("load", "figure")) else "right")
        for load in loads:
            if load.streams == 1 and load.name in rows:
                self._add(
                    table,
                    load.name,
                    "TTFT, float32 prefill",
                    1e3 * self.prefill_s(load.prompt_tokens),
                    rows[load.name]["ttft_p50_ms"],
                )
                for format in _BYTES_A_WEIGHT:
                    self._add(table, load.name, f"TPOT, {format}", 1e3 * self.decode_step_s(format), rows[load.name]["tpot_p50_ms"])
        Console(width=130).print(table)

    @staticmethod
    def _add(table: Table, load: str, figure: str, floor_ms: float, measured_ms: float | None) -> None:
        measured = ("-", "-") if measured_ms is None else (f"{measured_ms:.1f} ms", f"{measured_ms / floor_ms:.2f}")
        table.add_row(load, figure, f"{floor_ms:.1f} ms", *measured)


def measure_floors(files: ModelFiles, threads: int) -> Floors:
    """Takes a second; nothing else should run."""
    torch.set_num_threads(threads)
    config = load_model_config(files.format, files.path, files.random_config)
    return Floors(_read_rate(), _product_rate(), *_sizes(config))


def _sizes(config: ModelConfig) -> tuple[int, int, int]:
    layers = sum(
        item.shape[0] * item.shape[1] for item in plan_tensors(config) if item.is_matrix and item.name.startswith("layers.")
    )
    return layers, config.vocab_size * config.hidden_size, config.num_layers * config.query_size


def _read_rate() -> float:
    values = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _best(values.sum)


def _product_rate() -> float:
    left, right = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    return 2 * _SIZE**3 / _best(lambda: torch.mm(left, right))


def _best(work: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best

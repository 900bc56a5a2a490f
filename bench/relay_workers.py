"""A worker whose model computes nothing, all else being real: `python -m bench.relay_workers ROLE STEP_MS ROW_MS [ENDS]`.

Prints its address and serves until its input ends. A step of decode takes STEP_MS, and ROW_MS for each sequence; one of prefill
no time. Into the file ENDS goes at last when each step ended, as JSON: nanoseconds of the monotonic clock.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from decode_svc.settings import DecodeSettings
from decode_svc.worker import DecodeWorker
from llm.config import load_model_config
from llm.kv.allocator import BlockAllocator
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import ModelRunner
from llm.startup import LoadedModel
from prefill_svc.settings import PrefillSettings
from prefill_svc.worker import PrefillWorker
from tandem.addresses import free_port
from tandem.models import ModelFiles, resolve_model
from tandem.pauses import avoid_pauses
from tandem.server import ServerSettings, run
from tandem.tracing import configure_tracing

MODEL = "random:tiny"
# A letter of the byte-level vocabulary of random models.
TOKEN_ID = 3 + ord("a")
_BLOCK_TOKENS, _NUM_BLOCKS = 16, 16_384


class PacedRunner:
    """Stands for GpuModelRunner: steps follow each other on a device that draws the same token each time."""

    weight_format = weight_format_reason = device_description = "none"

    def __init__(self, files: ModelFiles, step_s: float, row_s: float) -> None:
        self.config = load_model_config(files.format, files.path, files.random_config)
        self._step_s, self._row_s = step_s, row_s
        self._free_at = 0.0
        self.ends_ns: list[int] = []

    def adopt_thread(self) -> None:
        """Nothing to take over."""

    def report_layers(self, layer_done: Callable[[], None]) -> None:
        """Steps have no layers."""

    def forward(self, slices: Sequence[Any]) -> Any:
        raise AssertionError("all rows are drawn on the device")

    def start_step(
        self, slices: Sequence[Any], sources: Sequence[int], rows: Sequence[Any], after: Sequence[Any] = ()
    ) -> "_PacedStep":
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s + self._row_s * len(rows)
        return _PacedStep(self._free_at, len(rows), self.ends_ns)


class _PacedStep:
    def __init__(self, ends_at: float, num_rows: int, ends_ns: list[int]) -> None:
        self._ends_at, self._num_rows, self._ends_ns = ends_at, num_rows, ends_ns

    def wait_filled(self) -> None:
        time.sleep(max(0.0, self._ends_at - time.perf_counter()))

    def token_ids(self) -> list[int]:
        time.sleep(max(0.0, self._ends_at - time.perf_counter()))
        self._ends_ns.append(time.monotonic_ns())
        return [TOKEN_ID] * self._num_rows


def _loaded(runner: PacedRunner) -> LoadedModel:
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, _BLOCK_TOKENS, "bfloat16")
    pool = KvPool.create(layout, _NUM_BLOCKS)
    allocator = BlockAllocator(pool.num_blocks, _BLOCK_TOKENS, handed_out=pool.generations.bump)
    return LoadedModel(cast(ModelRunner, runner), pool, allocator, layout)


async def _serve(role: str, files: ModelFiles, runner: PacedRunner) -> None:
    server = ServerSettings(port=free_port("127.0.0.1"), grace_s=0.5, exit_with_parent=True)
    if role == "prefill":
        worker: PrefillWorker | DecodeWorker = PrefillWorker(PrefillSettings(server=server), files, _loaded(runner))
    else:
        worker = DecodeWorker(DecodeSettings(server=server), files, _loaded(runner))
    avoid_pauses()
    print(await worker.start(), flush=True)
    await worker.run_until_stopped()


def main(role: str, step_ms: str, row_ms: str, *ends: str) -> None:
    configure_tracing(f"tandem.{role}")
    files = resolve_model(MODEL)
    step_s, row_s = (float(step_ms) / 1e3, float(row_ms) / 1e3) if role == "decode" else (0.0, 0.0)
    runner = PacedRunner(files, step_s, row_s)
    try:
        run(_serve(role, files, runner))
    finally:
        for path in ends:
            Path(path).write_text(json.dumps(runner.ends_ns))


if __name__ == "__main__":
    main(*sys.argv[1:])

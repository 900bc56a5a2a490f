"""Times prefill and decode steps of a model alone, without services, against their floors.

`python -m bench.engine [--model llama-3.1-8b] [--decode 1,64] [--prefill 1024,8192] [--profile] [--json out.json]`, weights are
random. A decode step's floor is reading weights and KV once at the measured bandwidth; a prefill's is its operations at the rate of
the library's matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_timing import Ceilings, measure_ceilings, need_gpu
from bench.options import new_parser
from decode_svc.kernels.paged_attention import PagedAttention
from llm.batch import SequenceSlice
from llm.config import ModelConfig
from llm.gpu.runner import GpuModelRunner
from llm.gpu.settings import GpuSettings
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import RunnerSettings
from llm.sampling import SampleRow
from llm.sampling_params import SamplingParams
from prefill_svc.kernels.choice import gpu_settings
from tandem.random_models import RANDOM_MODELS

_PAGE = 16


@dataclass(frozen=True)
class RandomFiles:
    """Random weights of a known shape."""

    name: str
    random_config: Mapping[str, Any]
    format: str = "random"
    path: Path | None = None
    digest: str = "random"


@dataclass(frozen=True)
class Figure:
    """One load. `milliseconds` is the median of a step with the host's part; `device_ms` what the device alone took."""

    name: str
    milliseconds: float
    device_ms: float
    floor_ms: float

    @property
    def fraction(self) -> float:
        return self.floor_ms / self.milliseconds


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    need_gpu()
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: {ceilings}", flush=True)
    figures = []
    decode, prefill = ([int(item) for item in text.split(",") if item] for text in (options.decode, options.prefill))
    if decode:
        figures += _bench_decode(options, decode, ceilings)
        torch.cuda.empty_cache()
    if prefill:
        figures += _bench_prefill(options, prefill, ceilings)
    _print_table(figures)
    if options.json:
        options.json.write_text(json.dumps({"ceilings": asdict(ceilings), "steps": [asdict(item) for item in figures]}, indent=1))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("engine", "Times prefill and decode steps on a GPU alone, without services, against their floors.")
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(RANDOM_MODELS), help="its shape, with random weights")
    parser.add_argument("--decode", default="1,2,4,8,16,32,64,128", help="batch sizes of decode steps")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence that decodes")
    parser.add_argument("--prefill", default="512,1024,2048,4096,8192,15000", help="tokens of prompts")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def _load(options: argparse.Namespace, gpu: GpuSettings, num_tokens: int) -> GpuModelRunner:
    files = RandomFiles(f"random:{options.model}", RANDOM_MODELS[options.model])
    began = time.monotonic()
    runner = GpuModelRunner.load(files, RunnerSettings("decode", "cuda:0", gpu=gpu))
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, _PAGE, runner.kv_dtype)
    pool = KvPool.create(layout, -(-num_tokens // _PAGE) + 8, "cuda")
    for block in pool.tensor.split(256):  # type: ignore[no-untyped-call]
        block.normal_()
    runner.attach(pool)
    loaded = time.monotonic()
    runner.warm_up()
    torch.cuda.synchronize()
    print(f"weights in {loaded - began:.1f} s, warm-up in {time.monotonic() - loaded:.1f} s", flush=True)
    return runner


def _bench_decode(options: argparse.Namespace, batches: Sequence[int], ceilings: Ceilings) -> list[Figure]:
    runner = _load(options, GpuSettings(PagedAttention(), max(batches)), max(batches) * (options.context + _PAGE))
    figures = []
    for batch in batches:
        slices = _decode_slices(batch, options.context)
        floor = decode_bytes(runner.config, batch, options.context) / ceilings.read_gb_s / 1e6
        device = _device_ms(lambda slices=slices: runner.forward(slices))  # type: ignore[misc]
        figures.append(Figure(f"decode {batch} x {options.context}", _pipelined_ms(runner, slices), device, floor))
        print(_line(figures[-1]), flush=True)
        if options.profile and batch in (1, 64):
            _profile(lambda slices=slices: runner.forward(slices))  # type: ignore[misc]
    return figures


def _decode_slices(batch: int, context: int) -> list[SequenceSlice]:
    per = -(-context // _PAGE)
    return [SequenceSlice([5 + index], context - 1, range(index * per, (index + 1) * per)) for index in range(batch)]


def _pipelined_ms(runner: GpuModelRunner, slices: Sequence[SequenceSlice], steps: int = 60) -> float:
    """Wall time of a step when each is launched before the tokens of the one before are read, as an engine would."""
    rows = [SampleRow(SamplingParams(temperature=0.0), (), 0)] * len(slices)
    sources = list(range(len(slices)))
    pending = runner.start_step(slices, [-1] * len(slices), rows)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        following = runner.start_step(slices, sources, rows)
        pending.token_ids()
        pending = following
        times.append(1e3 * (time.perf_counter() - began))
    pending.token_ids()
    return statistics.median(times[10:])


def decode_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """Weights read once, and each sequence's K and V, in bytes of bfloat16."""
    per_layer = config.hidden_size * (config.qkv_size + config.query_size + 3 * config.intermediate_size)
    weights = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    return 2.0 * (weights + batch * context * config.num_layers * 2 * config.kv_size)


def _bench_prefill(options: argparse.Namespace, lengths: Sequence[int], ceilings: Ceilings) -> list[Figure]:
    settings = gpu_settings("cuda", max_prompts=16)
    assert settings is not None, "for a GPU"
    runner = _load(options, settings, max(lengths))
    figures = []
    for tokens in lengths:
        slices = [SequenceSlice(torch.randint(3, runner.config.vocab_size, (tokens,)).tolist(), 0, range(-(-tokens // _PAGE)))]
        floor = prefill_flops(runner.config, tokens) / ceilings.bf16_tflop_s / 1e9
        wall = _wall_ms(lambda slices=slices: runner.forward(slices))  # type: ignore[misc]
        device = _device_ms(lambda slices=slices: runner.forward(slices), repeats=5)  # type: ignore[misc]
        figures.append(Figure(f"prefill {tokens}", wall, device, floor))
        print(_line(figures[-1]), flush=True)
        if options.profile and tokens in (1024, 8192):
            _profile(lambda slices=slices: runner.forward(slices))  # type: ignore[misc]
    return figures


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Products of the layers for every token, causal attention, and the head for the last token."""
    per_layer = config.hidden_size * (config.qkv_size + config.query_size + 3 * config.intermediate_size)
    attention = 2.0 * tokens * tokens * config.query_size * config.num_layers
    return 2.0 * tokens * config.num_layers * per_layer + attention + 2.0 * config.vocab_size * config.hidden_size


def _wall_ms(call: Callable[[], torch.Tensor], repeats: int = 7) -> float:
    """The host's part included: laying out, uploading, launching, and reading one number back."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()[-1, 0].item()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def _device_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """From the first launch to the end of the last, repeats queued one after another; the host's part shows where it is longer."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def _profile(call: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60), flush=True)


def _line(figure: Figure) -> str:
    times = f"{figure.milliseconds:.2f} ms (device {figure.device_ms:.2f}), floor {figure.floor_ms:.2f}"
    return f"{figure.name}: {times}, {figure.fraction:.2f}"


def _print_table(figures: Sequence[Figure]) -> None:
    table = Table(title="steps alone")
    for heading in ("step", "ms", "device ms", "floor ms", "floor / ms"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for item in figures:
        table.add_row(item.name, *(f"{value:.2f}" for value in (item.milliseconds, item.device_ms, item.floor_ms, item.fraction)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

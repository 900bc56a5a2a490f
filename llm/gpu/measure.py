"""What can only be known of a GPU by running the model on it: how much memory is left for KV, and how many tokens keep it busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from llm.batch import SequenceSlice
from llm.errors import DeviceError
from llm.kv.layout import KvLayout
from llm.weights import Progress

if TYPE_CHECKING:
    from llm.gpu.runner import GpuModelRunner

_MIB = 1 << 20
_CONTEXT_BYTES = 768 * _MIB
"""The driver's context with its modules, seen on Hopper with torch and Triton loaded; torch does not count it."""
_GRAPH_BYTES = 8 * _MIB
"""What the driver keeps of one captured step beside its tensors."""
_MARGIN_BYTES = 256 * _MIB
_STEP_SIZES = (1024, 2048, 4096, 8192)
"""The least is where the host's part of a step, which varies, is surely the shorter one."""
_SATURATED = 0.9
"""Of the best rate. Twice the tokens for the last tenth would make every prompt wait twice as long for its step."""
_STEPS_A_BUDGET = 2
"""Prompts are packed to half of the token budget (prefill_svc.fairness): that half is to keep the device busy."""
_DECODE_TOKENS = 512
"""Tokens of a decode worker's largest step: a batch, and sequences that are computed again."""


@dataclass(frozen=True)
class Measured:
    """`pool_bytes`: memory for KV blocks. `step_tokens`: of the largest step; half of them keep the device busy."""

    pool_bytes: int
    step_tokens: int


@dataclass(frozen=True)
class MemoryUse:
    """Of one device and one process, in bytes. `peak` and `held` are torch's, now and at the largest step, without KV blocks."""

    total: int
    free: int
    peak: int
    held: int
    num_graphs: int


class _Scratch:
    """As many KV blocks as the largest step needs, while the pool's size is not known."""

    def __init__(self, layout: KvLayout, num_tokens: int, device: torch.device) -> None:
        dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
        self.tensor = torch.zeros(layout.blocks_for(num_tokens), *layout.block_shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def measure(runner: GpuModelRunner, layout: KvLayout, fraction: float, progress: Progress) -> Measured:
    """Runs the largest step over a scratch pool, which is gone afterwards. DeviceError if nothing is left for KV.

    `fraction`: this worker's share of the device's memory, all included.
    """
    decodes = runner.max_batch > 0
    wanted = (_DECODE_TOKENS,) if decodes else _STEP_SIZES
    sizes = sorted({min(size, runner.config.context_tokens) for size in wanted})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runner.device)
    scratch = _Scratch(layout, max(sizes), runner.device)
    runner.attach(scratch)
    runner.warm_up(progress)
    progress(0.0, "measuring steps")
    tokens = max(sizes) if decodes else _step_tokens(runner, sizes)
    _forward(runner, tokens, "last" if decodes else "all")
    peak, num_graphs = torch.cuda.max_memory_reserved(runner.device) - scratch.num_bytes, runner.num_graphs
    runner.detach()
    del scratch
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(runner.device)
    use = MemoryUse(total, free, peak, torch.cuda.memory_reserved(runner.device), num_graphs)
    return Measured(pool_bytes(use, fraction), tokens)


def pool_bytes(use: MemoryUse, fraction: float) -> int:
    """What a process may still take: within its share, and within what is free, since others may use the device too.

    DeviceError if that is nothing.
    """
    own = use.peak + _CONTEXT_BYTES + use.num_graphs * _GRAPH_BYTES
    to_come = use.peak - use.held + use.num_graphs * _GRAPH_BYTES + _MARGIN_BYTES
    room = min(int(fraction * use.total) - own, use.free - to_come)
    if room <= 0:
        raise DeviceError(
            f"no GPU memory is left for KV blocks: of {use.total // _MIB} MiB this worker may take {fraction:.0%}, "
            f"{use.free // _MIB} MiB are free, and its weights and largest step take {own // _MIB} MiB; "
            "raise --gpu-memory-fraction, or give the worker a GPU of its own"
        )
    return room


def _step_tokens(runner: GpuModelRunner, sizes: Sequence[int]) -> int:
    return min(max(sizes), _STEPS_A_BUDGET * smallest_saturating(_step_times(runner, sizes)))


def smallest_saturating(seconds: Mapping[int, float]) -> int:
    """`seconds` by tokens of a step -> the fewest tokens at which the rate is at least _SATURATED of the best."""
    best = max(tokens / taken for tokens, taken in seconds.items())
    return min(tokens for tokens, taken in seconds.items() if tokens / taken >= _SATURATED * best)


def _step_times(runner: GpuModelRunner, sizes: Sequence[int]) -> dict[int, float]:
    return {size: _best_of(3, lambda size=size: _forward(runner, size, "last")) for size in sizes}  # type: ignore[misc]


def _best_of(repeats: int, run: Callable[[], None]) -> float:
    """The first run compiles and is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _forward(runner: GpuModelRunner, num_tokens: int, logits: Literal["last", "all"]) -> None:
    runner.forward([SequenceSlice([0] * num_tokens, 0, range(num_tokens), logits)])[-1, 0].item()

"""Brings a worker's model and KV pool up together."""

import logging
from dataclasses import dataclass

import psutil

from llm.device import is_gpu
from llm.format_choice import settle_format
from llm.kv.allocator import BlockAllocator
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.kv.settings import KvSettings
from llm.runner import ModelRunner, RunnerSettings
from llm.weights import ModelFiles, Progress

logger = logging.getLogger(__name__)

_MIB = 1 << 20
_CPU_STEP_TOKENS = 512
"""Where a CPU's prefill rate stops growing; see docs/performance.md."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its pool and the allocator of the pool's blocks."""

    runner: ModelRunner
    pool: KvPool
    allocator: BlockAllocator
    layout: KvLayout
    step_tokens: int = _CPU_STEP_TOKENS
    """Most prompt tokens of one step; half of them keep the device busy."""


def load_model(files: ModelFiles, runner_settings: RunnerSettings, kv: KvSettings, progress: Progress | None = None) -> LoadedModel:
    """Loads weights, makes the pool and warms the kernels up; takes seconds to minutes, so call it off the event loop."""
    runner_settings = settle_format(files, runner_settings, progress or (lambda fraction, text: None))
    runner = ModelRunner.load(files, runner_settings, progress)
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, kv.block_tokens, runner.kv_dtype)
    count, step_tokens, report = num_blocks(layout, kv), _CPU_STEP_TOKENS, progress
    if is_gpu(runner_settings.device):
        count, step_tokens = _measure(runner, layout, kv, _part(progress, 0.0))
        report = _part(progress, 0.5)
    pool = KvPool.create(layout, count, runner_settings.device)
    runner.attach(pool)
    runner.warm_up(report)
    allocator = BlockAllocator(pool.num_blocks, kv.block_tokens, kv.prefix_cache, pool.generations.bump)
    return LoadedModel(runner, pool, allocator, layout, step_tokens)


def _measure(runner: ModelRunner, layout: KvLayout, kv: KvSettings, progress: Progress) -> tuple[int, int]:
    """Blocks, and tokens of a step, for a GPU. What the settings fix is not measured."""
    from llm.gpu.measure import measure
    from llm.gpu.runner import GpuModelRunner

    assert isinstance(runner, GpuModelRunner), "a GPU needs its own runner"
    runner.adopt_thread()
    measured = measure(runner, layout, kv.gpu_memory_fraction, progress)
    fixed = kv.kv_blocks > 0 or kv.kv_memory_mib > 0
    count = num_blocks(layout, kv) if fixed else max(1, measured.pool_bytes // layout.block_bytes)
    size_gib = count * layout.block_bytes / (1 << 30)
    logger.info("measured: %d KV blocks (%.1f GiB); prefill steps of %d tokens at most", count, size_gib, measured.step_tokens)
    return count, measured.step_tokens


def _part(progress: Progress | None, begin: float) -> Progress:
    """Half of the whole load, from `begin` on: a GPU warms up twice, first to measure."""
    return lambda fraction, text: None if progress is None else progress(begin + fraction / 2, text)


def num_blocks(layout: KvLayout, kv: KvSettings) -> int:
    """Blocks for the settings; on a CPU the pool's pages are taken from the system only as they are first written."""
    if kv.kv_blocks > 0:
        return kv.kv_blocks
    memory_bytes = kv.kv_memory_mib * _MIB or min(psutil.virtual_memory().total // 8, 1024 * _MIB)
    return max(1, memory_bytes // layout.block_bytes)

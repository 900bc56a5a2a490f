"""Brings a worker's model and KV pool up together."""

import logging
from dataclasses import dataclass

import psutil

from llm.config import ModelConfig
from llm.device import is_gpu
from llm.format_choice import Role, settle_format
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
_LARGEST_POOL_BYTES = 1024 * _MIB
"""Of a CPU's worker whose settings do not say."""
_LEAST_PROMPTS = 2
"""Prompts of the model's whole context for which a prefill worker has room, if that takes no larger pool."""


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
    count, step_tokens, report = (
        num_blocks(layout, kv, host_pool_bytes(layout, runner_settings.role, config)),
        _CPU_STEP_TOKENS,
        progress,
    )
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
    count = num_blocks(layout, kv, measured.pool_bytes)
    size_gib = count * layout.block_bytes / (1 << 30)
    logger.info("measured: %d KV blocks (%.1f GiB); prefill steps of %d tokens at most", count, size_gib, measured.step_tokens)
    return count, measured.step_tokens


def _part(progress: Progress | None, begin: float) -> Progress:
    """Half of the whole load, from `begin` on: a GPU warms up twice, first to measure."""
    return lambda fraction, text: None if progress is None else progress(begin + fraction / 2, text)


def host_pool_bytes(layout: KvLayout, role: Role, config: ModelConfig) -> int:
    """Of a CPU worker's pool if its settings do not say; pages are taken from the system only as they are first written.

    A prefill worker gets half: its blocks are passed on, and what finished prompts leave for later ones would fill any pool.
    """
    most = min(int(psutil.virtual_memory().total) // 8, _LARGEST_POOL_BYTES)
    if role == "decode":
        return most
    return min(most, max(_LARGEST_POOL_BYTES // 2, _LEAST_PROMPTS * layout.blocks_for(config.context_tokens) * layout.block_bytes))


def num_blocks(layout: KvLayout, kv: KvSettings, default_bytes: int) -> int:
    """Blocks for the settings, or as many as `default_bytes` hold."""
    return kv.kv_blocks or max(1, (kv.kv_memory_mib * _MIB or default_bytes) // layout.block_bytes)

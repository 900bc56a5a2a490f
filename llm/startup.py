"""Brings a worker's model and KV pool up together."""

from dataclasses import dataclass

import psutil

from llm.kv.allocator import BlockAllocator
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.kv.settings import KvSettings
from llm.runner import ModelRunner, RunnerSettings
from llm.weights import ModelFiles, Progress

_MIB = 1 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its pool and the allocator of the pool's blocks."""

    runner: ModelRunner
    pool: KvPool
    allocator: BlockAllocator
    layout: KvLayout


def load_model(files: ModelFiles, runner_settings: RunnerSettings, kv: KvSettings, progress: Progress | None = None) -> LoadedModel:
    """Loads weights, makes the pool and warms the kernels up; takes seconds to minutes, so call it off the event loop."""
    runner = ModelRunner.load(files, runner_settings, progress)
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, kv.block_tokens, runner.kv_dtype)
    pool = KvPool.create(layout, num_blocks(layout, kv), runner_settings.device)
    runner.attach(pool)
    runner.warm_up(progress)
    allocator = BlockAllocator(pool.tensor.shape[0], kv.block_tokens, prefix_cache=kv.prefix_cache)
    return LoadedModel(runner, pool, allocator, layout)


def num_blocks(layout: KvLayout, kv: KvSettings) -> int:
    """Blocks for the settings; on a CPU the pool's pages are taken from the system only as they are first written."""
    if kv.kv_blocks > 0:
        return kv.kv_blocks
    memory_bytes = kv.kv_memory_mib * _MIB or min(psutil.virtual_memory().total // 8, 1024 * _MIB)
    return max(1, memory_bytes // layout.block_bytes)

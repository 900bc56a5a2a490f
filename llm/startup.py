"""Brings a worker's model and KV pool up together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from llm.kv.allocator import BlockAllocator
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import ModelRunner, RunnerSettings

_MIB = 1 << 20


@dataclass(frozen=True)
class KvSettings:
    """How KV blocks are made."""

    kv_blocks: int = field(default=0, metadata={"help": "KV blocks in the pool; 0: as many as --kv-memory-mib holds"})
    kv_memory_mib: int = field(
        default=0, metadata={"help": "memory for the KV pool in MiB; 0: an eighth of the machine's memory, at most 1024 on a CPU"}
    )
    block_tokens: int = field(default=16, metadata={"help": "tokens of one KV block; the same for every worker of a suite"})
    prefix_cache: bool = field(default=True, metadata={"help": "keep the KV of finished prompts for later ones that begin alike"})


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its pool and the allocator of the pool's blocks."""

    runner: ModelRunner
    pool: KvPool
    allocator: BlockAllocator
    layout: KvLayout


def load_model(
    files: "object", runner_settings: RunnerSettings, kv: KvSettings, progress: Callable[[float, str], None] | None = None
) -> LoadedModel:
    """Loads weights, makes the pool and warms the kernels up; takes seconds to minutes, so call it off the event loop."""
    runner = ModelRunner.load(files, runner_settings, progress)
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, kv.block_tokens, runner.kv_dtype)
    pool = KvPool.create(layout, num_blocks(layout, kv), runner_settings.device)
    runner.attach(pool)
    runner.warm_up()
    allocator = BlockAllocator(pool.tensor.shape[0], kv.block_tokens, prefix_cache=kv.prefix_cache)
    return LoadedModel(runner, pool, allocator, layout)


def num_blocks(layout: KvLayout, kv: KvSettings) -> int:
    """Blocks for the settings; on a CPU the pool's pages are taken from the system only as they are first written."""
    if kv.kv_blocks > 0:
        return kv.kv_blocks
    memory_bytes = kv.kv_memory_mib * _MIB or min(psutil.virtual_memory().total // 8, 1024 * _MIB)
    return max(1, memory_bytes // layout.block_bytes)



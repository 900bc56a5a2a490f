"""What a pull over cuda_ipc is made of: the copy alone, the checksums alone, and both as the transport runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu_timing import Call
from bench.transfer_processes import scattered
from llm.kv.device_lane import MAX_BLOCKS, Lane
from llm.kv.device_memory import ImportedMemory
from llm.kv.exported_memory import ExportedMemory
from llm.kv.pool import KvPool, blocks_in
from llm.ops.gpu.block_copy import copy_blocks
from llm.ops.gpu.checksum import block_checksums

_REPEATS = 20


@dataclass(frozen=True)
class Parts:
    """Medians. `copy_engine` is one contiguous copy of as many bytes; `fetch` the whole as a thread sees it, launches included."""

    mib: float
    copy_engine_gb_s: float
    gather_gb_s: float
    gather_us: float
    checksum_us: float
    fetch_us: float


def measure_parts(exported: ExportedMemory, pool: KvPool, counts: Sequence[int]) -> dict[str, Parts]:
    """For each number of blocks, at most MAX_BLOCKS."""
    memory = ImportedMemory(exported, pool.tensor.device)
    try:
        source = blocks_in(memory.tensor, pool.layout)
        return {f"{count} blocks": _measure(source, pool, min(count, MAX_BLOCKS)) for count in counts}
    finally:
        memory.close()


def _measure(source: torch.Tensor, pool: KvPool, count: int) -> Parts:
    theirs, ours = scattered(source.shape[0], count), scattered(pool.num_blocks, count)
    ids = [torch.tensor(each, dtype=torch.int32, device=pool.tensor.device) for each in (theirs, ours)]
    num_bytes = count * pool.layout.block_bytes
    gather_us = _device_us(partial(copy_blocks, source, pool.tensor, *ids))
    return Parts(
        mib=num_bytes / 2**20,
        copy_engine_gb_s=num_bytes / _device_us(partial(pool.tensor[:count].copy_, source[:count])) / 1e3,
        gather_gb_s=num_bytes / gather_us / 1e3,
        gather_us=gather_us,
        checksum_us=_device_us(partial(block_checksums, pool.tensor, ids[1])),
        fetch_us=_wall_us(partial(Lane(pool.tensor).fetch, source, theirs, ours)),
    )


def _device_us(call: Call) -> float:
    call()
    return statistics.median(_between_events_us(call) for _ in range(_REPEATS))


def _between_events_us(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000)  # the launches' own time passes meanwhile
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _wall_us(call: Call) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1e3)
    return statistics.median(times)

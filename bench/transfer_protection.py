"""What checksums and heartbeats cost a hand-off: two pairs of processes side by side, one of which has neither, in turns.

Nothing of a worker leads here: the bare pair is made of classes that only this program has.
"""

import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np

from bench.transfer_processes import Case, Consumer, Pair
from kvtransfer.host_blocks import HostBlocks
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Memory, NativeCopies
from llm.kv.pool import KvPool
from llm.ops.cpu.native import library
from tandem.models import cache_directory


class BareCopies(NativeCopies):
    """The same native code, told to take no checksums; it says that all of them are zero."""

    def checksums(self, pool: Memory, block_ids: BlockIds) -> Sums:
        return np.zeros(len(block_ids), np.uint64)

    def copy(self, source: Memory, source_ids: BlockIds, target: Memory, target_ids: BlockIds) -> Sums:
        self._copy(source, source_ids, target, target_ids, None)
        return self.checksums(source, source_ids)


def bare_blocks(pool: KvPool) -> HostBlocks:
    """Raises NativeUnavailableError without a compiler: there like would not be compared with like."""
    return HostBlocks(pool, BareCopies(library.load(cache_directory()), pool.layout.block_bytes))


@dataclass(frozen=True)
class Cost:
    """Medians in milliseconds, with and without protection, of the whole prompt and of the last chunk."""

    whole_ms: float
    bare_whole_ms: float
    whole_ratio: float
    handoff_ms: float
    bare_handoff_ms: float
    handoff_ratio: float


def bare(pair: Pair) -> Pair:
    return replace(pair, make_blocks=bare_blocks)


async def measure_cost(pipes: Sequence[Connection], pair: Pair, case: Case) -> Cost:
    """`pipes` lead to a producer of `pair` and to one of `bare(pair)`."""
    async with AsyncExitStack() as stack:
        consumers = []
        for pipe, each, beats in zip(pipes, (pair, bare(pair)), (True, False), strict=True):
            pool = KvPool.create(pair.layout, pair.num_blocks)
            pool.tensor.zero_()
            stack.callback(pool.close)
            consumers.append(
                await stack.enter_async_context(Consumer.over(pipe, pool, case.transport, each.make_blocks, beats=beats))
            )
        for consumer in consumers:
            await consumer.late_chunk(case)
        whole, late = ([[], []] for _ in range(2))  # type: tuple[list[list[float]], list[list[float]]]
        for _ in range(case.rounds):
            for index, consumer in enumerate(consumers):
                whole[index].append(await consumer.whole_prompt(case))
                late[index].append(await consumer.late_chunk(case))
    medians = [statistics.median(times) for times in (*whole, *late)]
    return Cost(medians[0], medians[1], medians[0] / medians[1], medians[2], medians[3], medians[2] / medians[3])

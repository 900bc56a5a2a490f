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
from llm.kv.host_copies import Memory
from llm.kv.pool import KvPool


class BareBlocks(HostBlocks):
    """Copies as who wants no checksum does, and says that all of them are zero."""

    def checksums(self, block_ids: BlockIds) -> Sums:
        return np.zeros(len(block_ids), np.uint64)

    def fetch(self, memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        target, size = self._pool.host_bytes, self._pool.layout.block_bytes
        for there, here in zip(source_ids.tolist(), block_ids.tolist(), strict=True):
            np.copyto(target[here * size : (here + 1) * size], memory[there * size : (there + 1) * size])
        return self.checksums(block_ids)


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
    return replace(pair, make_blocks=BareBlocks)


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

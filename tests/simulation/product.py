"""Where the simulation reaches into the product's modules beyond clocks, threads and sockets."""

from collections.abc import Sequence

import kvtransfer.blocks
import llm.steps
import prefill_svc.engine
from kvtransfer.host_blocks import HostBlocks
from llm.kv.pool import KvPool
from tests.simulation import model, threads
from tests.simulation.seams import Seams


class SlowBlocks(HostBlocks):
    """Reads and copies that take time, half a block after the other, and now and then damage what they copy."""

    def __init__(self, pool: KvPool) -> None:
        super().__init__(pool)
        self.num_per_job = 2

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        _pause()
        return super().checksums(block_ids)

    def fetch(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> list[int]:
        for source, block in zip(sources, block_ids, strict=True):
            target, half = self.view(block), len(source) // 2
            target[:half] = source[:half]
            _pause()
            target[half:] = source[half:]
            threads.loop().world.damage(target)
        return super().checksums(block_ids)


def _pause() -> None:
    random = threads.loop().random
    if random.random() < 0.3:
        threads.Time.sleep(random.choice((1e-5, 1e-3, 5e-3)))


def replace(seams: Seams) -> None:
    """Sampling without tensors, and the slow blocks."""
    for module in (llm.steps, prefill_svc.engine):
        seams.set(module, "sample", model.sample)
    seams.set(kvtransfer.blocks, "HostBlocks", SlowBlocks)

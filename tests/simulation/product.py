"""Where the simulation reaches into the product's modules beyond clocks, threads and sockets."""

import kvtransfer.blocks
import llm.steps
import prefill_svc.engine
from kvtransfer.connections import Connections
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Memory, PlainCopies
from llm.kv.pool import KvPool
from tests.simulation import model, threads
from tests.simulation.rpc import RELEASE
from tests.simulation.seams import Seams


class SlowBlocks(HostBlocks):
    """Reads and copies that take time, half a block after the other, and now and then damage what they copy."""

    def __init__(self, pool: KvPool) -> None:
        super().__init__(pool)
        self.num_per_turn, self.least_per_job, self.num_per_job = 1, 1, 2
        self.num_here = 0
        self._copies = PlainCopies(pool.layout.block_bytes)

    def checksums(self, block_ids: BlockIds) -> Sums:
        _pause()
        return super().checksums(block_ids)

    def fetch(self, memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        size = self._pool.layout.block_bytes
        for source_id, block in zip(source_ids.tolist(), block_ids.tolist(), strict=True):
            source, target, half = memory[source_id * size : (source_id + 1) * size].data, self.view(block), size // 2
            target[:half] = source[:half]
            threads.loop().world.reads()
            _pause()
            target[half:] = source[half:]
            threads.loop().world.damage(target)
        return super().checksums(block_ids)


def _pause() -> None:
    """Longer where the process has just been frozen: it is not to go on in the same breath."""
    random = threads.loop().random
    if threads.loop().current.frozen or random.random() < 0.3:
        threads.Time.sleep(random.choice((1e-5, 1e-3, 5e-3)))


_release = Connections.release


async def _release_or_lose(connections: Connections, ticket: KvTicket) -> bool:
    """While releases are lost, who sends one does not hear of it."""
    return RELEASE in threads.loop().world.rpc.lost_paths or await _release(connections, ticket)


def replace(seams: Seams) -> None:
    """Sampling without tensors, the slow blocks, and releases that get lost."""
    for module in (llm.steps, prefill_svc.engine):
        seams.set(module, "sample", model.sample)
    seams.set(kvtransfer.blocks, "HostBlocks", SlowBlocks)
    seams.set(Connections, "release", _release_or_lose)

"""A process of the suite, with what a test may look at."""

from collections.abc import Sequence
from typing import Any

from decode_svc.worker import DecodeWorker
from llm.kv.allocator import BlockAllocator
from llm.kv.pool import KvPool
from prefill_svc.worker import PrefillWorker
from tandem.server import Server
from tests.simulation.model import StampedRunner
from tests.simulation.process import Process


class WatchedAllocator(BlockAllocator):
    """Checks itself after whatever changes it."""

    def allocate(self, count: int) -> list[int]:
        blocks = super().allocate(count)
        self.check_integrity()
        return blocks

    def free(self, block_ids: Sequence[int]) -> None:
        super().free(block_ids)
        self.check_integrity()


class Node:
    """A process of the suite, with what a test may look at. `worker` and `allocator` stay unset in the gateway."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.service: Any = None
        self.worker: PrefillWorker | DecodeWorker | None = None
        self.allocator: BlockAllocator | None = None
        self.runner: StampedRunner | None = None
        self.pool: KvPool | None = None
        self.ready = False

    @property
    def worker_id(self) -> str:
        return "" if self.worker is None else self.worker._status._identity.worker_id

    @property
    def server(self) -> Server:
        return self.service.server if self.worker is None else self.worker._server  # type: ignore[no-any-return]

    @property
    def leaving(self) -> bool:
        """Has begun its shutdown."""
        return self.service is not None and self.server.stopping

    @property
    def idle(self) -> bool:
        """Holds no block, and no ticket."""
        if self.allocator is None or self.worker is None:
            return True
        producer = getattr(self.worker, "_producer", None)
        outstanding = 0 if producer is None else producer.num_outstanding
        return self.allocator.num_free == self.allocator.num_blocks and outstanding == 0

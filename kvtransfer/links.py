"""The producer's ends of the nccl transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.intake import settled
from kvtransfer.transports.nccl_link import MAX_LINKS, Link, LinkError
from llm.kv.block_arrays import BlockIds
from tandem.errors import Reason, TandemError

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks

logger = logging.getLogger(__name__)


class Links:
    """On the event loop; joining and sending run in threads of their own, one for each link."""

    def __init__(self, blocks: DeviceBlocks) -> None:
        self._blocks = blocks
        self._links: dict[str, Link] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._num_taken = 0
        self._threads = ThreadPoolExecutor(MAX_LINKS, "kv-link")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one more link. Raises QUEUE_FULL."""
        if self._num_taken >= MAX_LINKS:
            raise TandemError(Reason.QUEUE_FULL, f"the producer has {MAX_LINKS} NCCL links already")
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1

    @asynccontextmanager
    async def joined(self, link_id: str, unique_id: bytes) -> AsyncIterator[None]:
        """A link for which there is a place, while the context lasts. Raises TRANSFER_INTERRUPTED if it cannot be made."""
        joining = asyncio.get_running_loop().run_in_executor(self._threads, self._join, unique_id)
        try:
            self._links[link_id], self._turns[link_id] = await asyncio.shield(joining), asyncio.Lock()
            yield
        except LinkError as error:
            raise TandemError(Reason.TRANSFER_INTERRUPTED, str(error)) from error
        finally:
            self._links.pop(link_id, None)
            self._turns.pop(link_id, None)
            joining.add_done_callback(self._leave)

    @asynccontextmanager
    async def turn(self, link_id: str, block_ids: BlockIds) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """The link, for one message, with copies of the blocks; what the context gives sends them.

        Raises TRANSFER_INTERRUPTED if the link is lost, INVALID_REQUEST for more than it takes.
        """
        link = self._links.get(link_id)
        if link is None or link.lost:
            raise TandemError(Reason.TRANSFER_INTERRUPTED, "the NCCL link is lost")
        if len(block_ids) > link.max_blocks:
            raise TandemError(Reason.INVALID_REQUEST, f"a message has at most {link.max_blocks} blocks, not {len(block_ids)}")
        async with self._turns[link_id]:
            await self._in_thread(self._blocks.gather, block_ids, link.row[: len(block_ids)])
            yield lambda: self._in_thread(link.send, len(block_ids))

    async def close(self) -> None:
        """No call may be under way any more."""
        await asyncio.to_thread(self._threads.shutdown)

    def _join(self, unique_id: bytes) -> Link:
        """NCCL sets its connections up with the first message, so a first one is sent at once."""
        link = Link(unique_id, 0, self._blocks)
        self._blocks.gather(np.zeros(1, np.int32), link.row[:1])
        link.row[:1].zero_()
        link.send(1)
        return link

    async def _in_thread(self, work: Callable[..., None], *arguments: object) -> None:
        """Goes on to its end if this is cancelled, so that the link's next user finds it at rest."""
        working = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        await settled([working])
        try:
            working.result()
        except LinkError as error:
            raise TandemError(Reason.TRANSFER_INTERRUPTED, str(error)) from error

    def _leave(self, joining: asyncio.Future[Link]) -> None:
        if not joining.cancelled() and joining.exception() is None:
            self._threads.submit(joining.result().abort)

"""The consumer's side of the nccl transport: blocks are asked for by gRPC, and come as messages between the two GPUs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, TypeVar

from kvtransfer.control import ControlClient
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Arrival, Pull, follow, settled
from kvtransfer.pull_state import InterruptedPullError
from kvtransfer.ticket import KvTicket
from kvtransfer.transports.nccl_link import Link, LinkError, new_unique_id
from llm.kv.block_arrays import Sums
from tandem.errors import TandemError

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks

ResultT = TypeVar("ResultT")


class NcclClient:
    """The link to one producer, shared by all pulls from it, which take turns. On the event loop."""

    def __init__(self, control: ControlClient, blocks: DeviceBlocks) -> None:
        self._control = control
        self._blocks = blocks
        self._link_id = secrets.token_hex(16)
        self._link: Link | None = None
        self._membership = AsyncExitStack()
        self._thread = ThreadPoolExecutor(1, "kv-nccl")
        self._turn = asyncio.Lock()

    @classmethod
    async def join(cls, control: ControlClient, blocks: DeviceBlocks) -> NcclClient:
        """A new link; takes a second or so. Raises LinkError."""
        client = cls(control, blocks)
        try:
            await client._join()
        except BaseException as error:
            await client.close()
            if isinstance(error, TandemError | InterruptedPullError):
                raise LinkError(f"producer does not make an NCCL link: {error}") from error
            raise
        return client

    @property
    def lost(self) -> bool:
        return self._link is None or self._link.lost

    async def fetch(self, frames: AsyncGenerator[NewsFrame, None], pull: Pull) -> int:
        """Asks for the blocks that `frames` tell of; returns and raises what `follow` does."""

        async def bring(_: NewsFrame, new: NewsFrame) -> None:
            await self._bring(pull, new.first_block_index, new.num_blocks)

        return await follow(frames, pull, bring)

    async def close(self) -> None:
        """No pull may run any more."""
        if self._link is not None:
            await self._on_thread(self._link.abort)
        await self._membership.aclose()
        self._thread.shutdown(wait=False)

    async def _bring(self, pull: Pull, first: int, num_blocks: int) -> None:
        """In runs that the link's memory holds. A run is received whole even if the pull is cancelled: the next is then in step."""
        end = first + num_blocks
        while first < end:
            async with self._turn:
                link = self._link
                if link is None or link.lost:
                    raise InterruptedPullError("the NCCL link is lost")
                size = min(link.max_blocks, end - first)
                receiving = asyncio.create_task(self._receive(link, pull.ticket, first, size))
                await settled([receiving])
                receiving.result()
                job = pull.crew.submit(first, size, self._arrival(link, pull, first))
                await settled([job])
            pull.crew.check()
            first += size

    async def _receive(self, link: Link, ticket: KvTicket, first: int, num_blocks: int) -> None:
        async with self._control.sending(self._link_id, ticket, first, num_blocks):
            try:
                await self._on_thread(link.receive, num_blocks)
            except LinkError as error:
                raise InterruptedPullError(str(error)) from error

    def _arrival(self, link: Link, pull: Pull, base: int) -> Arrival:
        def arrive(first: int, last: int) -> Sums:
            return self._blocks.scatter(link.row[first - base : last - base], pull.destination.block_ids[first:last])

        return arrive

    async def _join(self) -> None:
        unique_id = await self._on_thread(new_unique_id)
        joined = await self._membership.enter_async_context(self._control.membership(self._link_id, unique_id))
        self._link = await self._on_thread(_link, unique_id, self._blocks)
        await joined()

    async def _on_thread(self, work: Callable[..., ResultT], *arguments: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _link(unique_id: bytes, blocks: DeviceBlocks) -> Link:
    """NCCL sets its connections up with the first message, so one comes at once."""
    link = Link(unique_id, 1, blocks)
    link.receive(1)
    return link

"""What a consumer keeps open towards each producer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
import torch

from kvtransfer.connections import Connections
from kvtransfer.control import ControlClient
from kvtransfer.fence import Fence
from kvtransfer.lifeline import Lifeline
from kvtransfer.mapped_file import UnmappableError, is_gone
from kvtransfer.mapping import Mapping
from kvtransfer.pull_state import StalledPullError
from kvtransfer.ticket import HeartbeatPort, KvPort, KvTicket
from kvtransfer.transports.nccl import NcclClient
from kvtransfer.transports.nccl_link import MAX_LINKS, LinkError
from llm.kv.device_memory import DeviceMemoryError, ImportedMemory
from llm.kv.exported_memory import ExportedMemory
from llm.kv.memory_file import MemoryFile
from tandem.errors import TandemError

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks

ResultT = TypeVar("ResultT")
Lifelines = Callable[[HeartbeatPort, str], Lifeline]


class Peer:
    """One producer process: a gRPC channel, and its mapped pool and KV connections once they are used."""

    def __init__(self, producer_id: str, channel: grpc.aio.Channel, lifelines: Lifelines, threads: Executor) -> None:
        self.producer_id = producer_id
        self.control = ControlClient(channel)
        self.num_users = 0
        self.lost = False
        """A pull was cut; kept only if the producer proves to be there after all."""
        self.announced = ""
        """The choice of transport that was logged last."""
        self.mapping: Mapping | None = None
        self.fence: Fence | None = None
        self.opening: asyncio.Task[ImportedMemory] | None = None
        """Opens its GPU memory; that is tried once."""
        self.joining: asyncio.Task[NcclClient] | None = None
        """Makes its NCCL link; that is tried once."""
        self._connections: Connections | None = None
        self._lifelines = lifelines
        self._threads = threads
        self._lifeline: Lifeline | None = None

    @asynccontextmanager
    async def alive(self, ticket: KvTicket) -> AsyncIterator[None]:
        """Keeps the ticket's lease while the context lasts.

        Interrupts it with StalledPullError if the producer is lost, with TICKET_NOT_FOUND if the producer says that it is over.
        """
        if ticket.heartbeat is None:
            yield
            return
        loop, endings = asyncio.get_running_loop(), list[StalledPullError | TandemError]()

        def end(error: StalledPullError | TandemError) -> None:
            if not endings and following:
                endings.append(error)
                limit.reschedule(loop.time())

        def end_soon(error: StalledPullError | TandemError) -> None:
            loop.call_soon_threadsafe(end, error)

        line = self._line(ticket.heartbeat)
        if not line.started:
            await loop.run_in_executor(self._threads, line.start)
        following = True
        try:
            async with asyncio.timeout(None) as limit:
                with line.follow(ticket, end_soon):
                    yield
        except TimeoutError as error:
            if endings:
                raise endings[0] from error
            raise
        finally:
            following = False

    def _line(self, port: HeartbeatPort) -> Lifeline:
        if self._lifeline is None or self._lifeline.gone or self._lifeline.port != port:
            self._close_lifeline()
            self._lifeline = self._lifelines(port, self.producer_id)
        return self._lifeline

    async def tell_released(self, ticket: KvTicket) -> bool:
        """Says that the ticket's blocks are here, by the way that they came; False if that is closed."""
        return self._connections is not None and await self._connections.release(ticket)

    def connections(self, port: KvPort) -> Connections:
        if self._connections is None or self._connections.port != port:
            self._hang_up()
            self._connections = Connections(port)
        return self._connections

    @property
    def gone(self) -> bool:
        """Whether the process is known to have ended."""
        if self.memory is not None and self.memory.producer_is_gone:
            return True
        return self.lost or (self.mapping is not None and is_gone(self.mapping.file))

    @property
    def memory(self) -> ImportedMemory | None:
        """Its GPU memory, once that is open."""
        return _result(self.opening)

    @property
    def nccl(self) -> NcclClient | None:
        """The link to it, once that is made."""
        return _result(self.joining)

    async def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
        if self.fence is not None:
            self.fence.close()
        for task in (self.opening, self.joining):
            if task is not None:
                await asyncio.wait([task])
        if self.nccl is not None:
            await self.nccl.close()
        if self.memory is not None:
            await asyncio.to_thread(self.memory.close)
        self._hang_up()
        self._close_lifeline()
        await self.control.close()

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()

    def _hang_up(self) -> None:
        if self._connections is not None:
            self._connections.close()


class Peers:
    """The producers by address; on the event loop.

    A peer is dropped when another process answers at its address, when a pull from it was cut for good, or when its process is seen
    to have ended: otherwise a dead producer's pool would stay in memory for as long as it is mapped.
    """

    def __init__(self, channels: Callable[[str], grpc.aio.Channel], lifelines: Lifelines, threads: Executor) -> None:
        self._channels = channels
        self._lifelines = lifelines
        self._threads = threads
        self._peers: dict[str, Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @contextmanager
    def using(self, ticket: KvTicket) -> Iterator[Peer]:
        """The ticket's producer; it stays open at least until the context is left."""
        peer = self._find(ticket)
        peer.num_users += 1
        try:
            yield peer
        finally:
            peer.num_users -= 1
            if peer.lost and self._peers.get(ticket.address) is peer:
                del self._peers[ticket.address]
            if peer.num_users == 0 and self._peers.get(ticket.address) is not peer:
                self._close_soon(peer)

    def map(self, peer: Peer, file: MemoryFile) -> Mapping:
        """The peer's pool. Raises UnmappableError, also if the file is not the one that this very producer offered before."""
        if peer.mapping is None:
            if any(other.mapping is not None and other.mapping.file == file for other in self._peers.values()):
                raise UnmappableError("offered memory is that of another producer (producer id differs)")
            peer.mapping = Mapping(file)
        if peer.mapping.file != file:
            raise UnmappableError("producer has offered other memory before under the same id")
        return peer.mapping

    def fence(self, peer: Peer, file: MemoryFile) -> Fence:
        """The peer's table of block generations. Raises UnmappableError as `map` does."""
        if peer.fence is None:
            peer.fence = Fence(file)
        if peer.fence.file != file:
            raise UnmappableError("producer has offered another table of block generations before under the same id")
        return peer.fence

    async def open(self, peer: Peer, exported: ExportedMemory, device: torch.device) -> ImportedMemory:
        """The peer's GPU memory, opened for `device`; takes a tenth of a second at the first time.

        Raises DeviceMemoryError, also if the offer is not the one that this very producer made before.
        """
        if peer.opening is None:
            if any(other.memory is not None and other.memory.exported == exported for other in self._peers.values()):
                raise DeviceMemoryError("offered memory is that of another producer (producer id differs)")
            peer.opening = asyncio.create_task(asyncio.to_thread(ImportedMemory, exported, device))
        memory = await asyncio.shield(peer.opening)
        if memory.exported != exported:
            raise DeviceMemoryError("producer has offered other memory before under the same id")
        return memory

    async def join(self, peer: Peer, blocks: DeviceBlocks) -> None:
        """The peer's NCCL link; takes a second or so at the first time. Raises LinkError."""
        if peer.joining is None:
            num_links = sum(other.joining is not None for other in self._peers.values())
            if num_links >= MAX_LINKS:
                raise LinkError(f"this worker has {num_links} NCCL links already")
            peer.joining = asyncio.create_task(NcclClient.join(peer.control, blocks))
        client = await asyncio.shield(peer.joining)
        if client.lost:
            raise LinkError("the NCCL link to the producer was lost")

    async def close(self) -> None:
        """No pull may run any more."""
        for peer in self._peers.values():
            self._close_soon(peer)
        self._peers.clear()
        await asyncio.gather(*self._closing)

    def _find(self, ticket: KvTicket) -> Peer:
        peer = self._peers.get(ticket.address)
        if peer is None or peer.producer_id != ticket.producer_id:
            self._drop_gone(ticket.address)
            peer = self._peers[ticket.address] = Peer(
                ticket.producer_id, self._channels(ticket.address), self._lifelines, self._threads
            )
        return peer

    def _drop_gone(self, address: str) -> None:
        """Forgets who was at the address, and whoever has ended meanwhile; users of theirs close them."""
        for known, peer in list(self._peers.items()):
            if known == address or peer.gone:
                del self._peers[known]
                if peer.num_users == 0:
                    self._close_soon(peer)

    def _close_soon(self, peer: Peer) -> None:
        task = asyncio.create_task(peer.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _result(task: asyncio.Task[ResultT] | None) -> ResultT | None:
    """What a task that ended well gave."""
    if task is None or not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()

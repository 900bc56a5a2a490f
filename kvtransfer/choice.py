"""Which transport a pull takes, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kvtransfer.host_blocks import HostBlocks
from kvtransfer.mapped_file import InvisibleProcessError, UnmappableError
from kvtransfer.peers import Peer, Peers
from kvtransfer.ticket import CudaIpcOffer, KvTicket, NcclOffer, ShmOffer, TcpOffer
from kvtransfer.transports.nccl_link import LinkError, nccl_version
from llm.kv.device_memory import DeviceMemoryError
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # it needs what only machines with a GPU have
    from kvtransfer.device_blocks import DeviceBlocks

OfferT = TypeVar("OfferT", CudaIpcOffer, ShmOffer, NcclOffer, TcpOffer)


@dataclass(frozen=True)
class TransportChoice:
    """A transport, and the reason for people."""

    transport: str
    reason: str

    def __str__(self) -> str:
        return f"{self.transport}: {self.reason}"


class NotOfferedError(Exception):
    """The producer does not offer the transport, or not for this ticket's blocks."""


class Chooser:
    """Chooses for a pool: the first of `allowed` that the producer offers and that works. `fastest`: the best for such a pool."""

    def __init__(self, allowed: Sequence[str], pool: KvPool, blocks: HostBlocks | DeviceBlocks, peers: Peers) -> None:
        self._pool = pool
        self._blocks = blocks
        self._peers = peers
        fastest = "cuda_ipc" if pool.on_device else "shm"
        self.usable = usable(allowed, pool)
        self._against = () if fastest in allowed else (f"{fastest} is switched off here",)

    async def choose(self, ticket: KvTicket, peer: Peer) -> TransportChoice:
        """Choosing shm or cuda_ipc opens the producer's pool, and nccl makes a link to it.

        If there is no way: FAILED_PRECONDITION (KV_LAYOUT_MISMATCH), but TRANSFER_INTERRUPTED where the producer may have ended.
        """
        against, why_not = list(self._against), Reason.KV_LAYOUT_MISMATCH
        for name in self.usable:
            try:
                reason = await self._try(name, ticket, peer)
                return TransportChoice(name, reason or "; ".join(against) or "preferred here")
            except (NotOfferedError, UnmappableError, DeviceMemoryError, LinkError) as error:
                against.append(str(error))
                if isinstance(error, InvisibleProcessError):
                    why_not = Reason.TRANSFER_INTERRUPTED
        message = f"no way to fetch the blocks: {'; '.join(against)}"
        raise TandemError(why_not, message, metadata={"producer_id": ticket.producer_id})

    async def _try(self, name: str, ticket: KvTicket, peer: Peer) -> str:
        """What speaks for it by itself; nothing for those that are taken for want of a better. Raises if it does not work."""
        match name:
            case "cuda_ipc":
                memory = _offer_of(ticket, CudaIpcOffer, name).memory
                _check_bounds(ticket, memory.num_bytes)
                self._fence(ticket, peer)
                opened = await self._peers.open(peer, memory, self._pool.tensor.device)
                return "same GPU, opened" if opened.on_same_device else "same host, read from GPU to GPU"
            case "shm":
                offer = _offer_of(ticket, ShmOffer, name)
                _check_bounds(ticket, offer.pool_bytes)
                self._peers.map(peer, offer.file)
                self._fence(ticket, peer)
                return "same host, mapped read-only"
            case "nccl":
                await self._join(_offer_of(ticket, NcclOffer, name), peer)
                return ""
            case _:
                _offer_of(ticket, TcpOffer, name)
                return ""

    def _fence(self, ticket: KvTicket, peer: Peer) -> None:
        if ticket.fence is None:
            raise NotOfferedError("producer does not fence its blocks")
        fence = self._peers.fence(peer, ticket.fence.file)
        if max(ticket.block_ids) >= fence.num_blocks:
            raise NotOfferedError("ticket names blocks that are not fenced")

    async def _join(self, offer: NcclOffer, peer: Peer) -> None:
        exported = self._pool.exported
        assert exported is not None and not isinstance(self._blocks, HostBlocks), "nccl is for GPUs"
        if offer.device_uuid == exported.device_uuid:
            raise LinkError("NCCL does not join two processes of one GPU")
        if (own := nccl_version()) != offer.nccl_version:
            raise LinkError(f"producer's NCCL is {offer.nccl_version}, this worker's {own}")
        await self._peers.join(peer, self._blocks)


def usable(transports: Sequence[str], pool: KvPool) -> tuple[str, ...]:
    """Those by which such a pool's blocks can go or come at all."""
    possible = {"cuda_ipc", "nccl", "tcp"} if pool.on_device else {"shm", "tcp"} if pool.shared is not None else {"tcp"}
    return tuple(name for name in transports if name in possible)


def offerable(transports: Sequence[str], pool: KvPool) -> tuple[str, ...]:
    """Those of the usable ones for which nothing is missing on this machine."""
    names = usable(transports, pool)
    try:
        if "nccl" in names:
            nccl_version()
    except LinkError as error:
        logger.info("nccl is not offered: %s", error)
        return tuple(name for name in names if name != "nccl")
    return names


def offer_of(ticket: KvTicket, kind: type[OfferT]) -> OfferT | None:
    """The ticket's offer of that kind."""
    return next((offer for offer in ticket.offers if isinstance(offer, kind)), None)


def _offer_of(ticket: KvTicket, kind: type[OfferT], name: str) -> OfferT:
    offer = offer_of(ticket, kind)
    if offer is None:
        raise NotOfferedError(f"producer does not offer {name}")
    return offer


def _check_bounds(ticket: KvTicket, pool_bytes: int) -> None:
    if (max(ticket.block_ids) + 1) * ticket.layout.block_bytes > pool_bytes:
        raise NotOfferedError("ticket names blocks outside of the offered memory")

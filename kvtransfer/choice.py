"""Which transport a pull takes, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvtransfer.peers import Peer, Peers
from kvtransfer.ticket import KvTicket, ShmOffer, TcpOffer
from kvtransfer.transports.shm import ShmUnavailableError
from tandem.errors import Reason, TandemError

OfferT = TypeVar("OfferT", ShmOffer, TcpOffer)


@dataclass(frozen=True)
class TransportChoice:
    """A transport, and the reason for people."""

    transport: str
    reason: str

    def __str__(self) -> str:
        return f"{self.transport}: {self.reason}"


def choose(ticket: KvTicket, allowed: Sequence[str], peers: Peers, peer: Peer) -> TransportChoice:
    """The first of `allowed` that the producer offers and that works; choosing shm maps its pool.

    FAILED_PRECONDITION (KV_LAYOUT_MISMATCH) if there is none.
    """
    against = [] if "shm" in allowed else ["shm is switched off here"]
    for name in allowed:
        try:
            if name == "shm":
                _map(ticket, peers, peer)
                return TransportChoice("shm", "same host, mapped read-only")
            if offer_of(ticket, TcpOffer) is not None:
                return TransportChoice("tcp", "; ".join(against) or "preferred here")
            against.append("producer does not offer tcp")
        except ShmUnavailableError as error:
            against.append(str(error))
    message = f"no way to fetch the blocks: {'; '.join(against)}"
    raise TandemError(Reason.KV_LAYOUT_MISMATCH, message, metadata={"producer_id": ticket.producer_id})


def offer_of(ticket: KvTicket, kind: type[OfferT]) -> OfferT | None:
    """The ticket's offer of that kind."""
    return next((offer for offer in ticket.offers if isinstance(offer, kind)), None)


def _map(ticket: KvTicket, peers: Peers, peer: Peer) -> None:
    offer = offer_of(ticket, ShmOffer)
    if offer is None:
        raise ShmUnavailableError("producer does not offer shm")
    if (max(ticket.block_ids) + 1) * ticket.layout.block_bytes > offer.pool_bytes:
        raise ShmUnavailableError("ticket names blocks outside of the offered memory")
    peers.map(peer, offer)

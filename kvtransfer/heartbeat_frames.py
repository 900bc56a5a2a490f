"""What the two sides say to each other to show that they live."""

from dataclasses import dataclass

from kvtransfer.packets import MAX_ITEMS, PacketFormat, items

MAX_TICKETS_PER_BEAT = MAX_ITEMS
"""More are told in several beats."""


@dataclass(frozen=True)
class BeatMessage:
    """Consumer: I live, and am pulling these tickets (of these epochs, in order) from the producer of this id."""

    producer_id: str
    number: int
    ticket_ids: tuple[str, ...] = items(0, MAX_TICKETS_PER_BEAT)
    epochs: tuple[int, ...] = items(0, MAX_TICKETS_PER_BEAT)


@dataclass(frozen=True)
class EchoMessage:
    """Producer: I live, and am this. `over` are the places in the beat of tickets that are unknown, over, or of another epoch."""

    producer_id: str
    number: int
    over: tuple[int, ...] = items(0, MAX_TICKETS_PER_BEAT)


HeartbeatMessage = BeatMessage | EchoMessage

HEARTBEAT_FORMAT = PacketFormat[HeartbeatMessage](b"TKH1", 1, (BeatMessage, EchoMessage))

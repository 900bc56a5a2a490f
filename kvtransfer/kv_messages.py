"""What goes over a KV connection: packets, and in the tcp transport after a NewsMessage its blocks' bytes."""

from dataclasses import dataclass

from kvtransfer.frames import MAX_ITEMS_PER_FRAME
from kvtransfer.packets import MAX_HEADER_BYTES, MAX_TEXT_BYTES, PREFIX, FrameError, PacketFormat, items

__all__ = ["MAX_HEADER_BYTES", "MAX_TEXT_BYTES", "PREFIX", "FrameError"]

MAX_METADATA = 16


@dataclass(frozen=True)
class PullMessage:
    """Consumer: tell me of the ticket's blocks from `first_block_index` on; and send them, unless `with_blocks` is 0."""

    ticket_id: str
    epoch: int
    first_block_index: int
    with_blocks: int


@dataclass(frozen=True)
class NewsMessage:
    """Producer: a NewsFrame. The bytes of its blocks follow if they were asked for. `first_token_id` holds one, or none."""

    ticket_id: str
    epoch: int
    first_block_index: int
    num_blocks: int
    block_bytes: int
    first_checksum_index: int
    checksums: tuple[int, ...] = items(0, MAX_ITEMS_PER_FRAME)
    first_token_id: tuple[int, ...] = items(0, 1)


@dataclass(frozen=True)
class ErrorMessage:
    """Producer: the pull is over. `metadata` holds keys and values in turn."""

    ticket_id: str
    epoch: int
    reason: str
    message: str
    metadata: tuple[str, ...] = items(0, 2 * MAX_METADATA)


@dataclass(frozen=True)
class ReleaseMessage:
    """Consumer: I have all of the ticket's blocks. Nothing answers it: where it is lost, the lease ends."""

    ticket_id: str
    epoch: int


Message = PullMessage | NewsMessage | ErrorMessage | ReleaseMessage

_FORMAT = PacketFormat[Message](b"TKV1", 2, (PullMessage, NewsMessage, ErrorMessage, ReleaseMessage))

encode = _FORMAT.encode
"""Prefix and header. A NewsMessage's blocks are for the caller to send after it."""
prefix = _FORMAT.prefix
header_bytes = _FORMAT.header_bytes
decode = _FORMAT.decode

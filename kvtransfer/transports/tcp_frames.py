"""The control frames of the tcp transport: packets, and after a BlocksMessage the blocks' bytes."""

from dataclasses import dataclass

from kvtransfer.frames import MAX_BLOCKS_PER_FRAME
from kvtransfer.packets import MAX_HEADER_BYTES, MAX_TEXT_BYTES, PREFIX, FrameError, PacketFormat, items

__all__ = ["MAX_HEADER_BYTES", "MAX_TEXT_BYTES", "PREFIX", "FrameError"]

MAX_METADATA = 16


@dataclass(frozen=True)
class PullMessage:
    """Consumer: send me the ticket's blocks from `first_block_index` on."""

    ticket_id: str
    epoch: int
    first_block_index: int


@dataclass(frozen=True)
class BlocksMessage:
    """Producer: `block_bytes` bytes follow for each checksum."""

    ticket_id: str
    epoch: int
    first_block_index: int
    block_bytes: int
    checksums: tuple[int, ...] = items(1, MAX_BLOCKS_PER_FRAME)


@dataclass(frozen=True)
class EndMessage:
    """Producer: that was the last block."""

    ticket_id: str
    epoch: int
    first_token_id: int


@dataclass(frozen=True)
class WaitMessage:
    """Producer: nothing is ready yet; I live."""

    ticket_id: str
    epoch: int


@dataclass(frozen=True)
class ErrorMessage:
    """Producer: the pull is over. `metadata` holds keys and values in turn."""

    ticket_id: str
    epoch: int
    reason: str
    message: str
    metadata: tuple[str, ...] = items(0, 2 * MAX_METADATA)


Message = PullMessage | BlocksMessage | EndMessage | WaitMessage | ErrorMessage

_FORMAT = PacketFormat[Message](b"TKV1", 1, (PullMessage, BlocksMessage, EndMessage, WaitMessage, ErrorMessage))

encode = _FORMAT.encode
"""Prefix and header. A BlocksMessage's blocks are for the caller to send after it."""
prefix = _FORMAT.prefix
header_bytes = _FORMAT.header_bytes
decode = _FORMAT.decode

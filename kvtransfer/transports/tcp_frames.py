"""The control frames of the tcp transport.

A frame is a prefix of 24 bytes (magic, length of the header, XXH3-64 of the header, XXH3-64 of these 16 bytes), a msgpack header,
and after the header of a BlocksMessage the blocks' bytes. The header is an array: version, kind, and the fields of the kind's class
in order. Frames come from whoever connects, so the prefix is checked before the header is read, the header's checksum before it is
decoded, and then every value.
"""

import struct
from dataclasses import dataclass, fields
from typing import Any

import msgpack

from kvtransfer.checksum import block_checksum
from kvtransfer.frames import MAX_BLOCKS_PER_FRAME

MAGIC = b"TKV1"
VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_TEXT_BYTES = 512
MAX_METADATA = 16

PREFIX = struct.Struct("!4sIQQ")
_CHECKED = 16
_MAX_U32 = 2**32 - 1
_MAX_U64 = 2**64 - 1


class FrameError(Exception):
    """The bytes are not a frame, or not one that may come here."""


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
    checksums: tuple[int, ...]


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
    metadata: tuple[str, ...]


Message = PullMessage | BlocksMessage | EndMessage | WaitMessage | ErrorMessage

_KINDS: tuple[type[Message], ...] = (PullMessage, BlocksMessage, EndMessage, WaitMessage, ErrorMessage)


def encode(message: Message) -> bytes:
    """Prefix and header. A BlocksMessage's blocks are for the caller to send after it."""
    values = [getattr(message, field.name) for field in fields(message)]
    header: bytes = msgpack.packb([VERSION, _KINDS.index(type(message)), *values])
    assert len(header) <= MAX_HEADER_BYTES, "the header is longer than any peer would read"
    return prefix(len(header), block_checksum(header)) + header


def prefix(num_header_bytes: int, header_checksum: int) -> bytes:
    """What goes before a header."""
    checked = PREFIX.pack(MAGIC, num_header_bytes, header_checksum, 0)[:_CHECKED]
    return checked + block_checksum(checked).to_bytes(8)


def header_bytes(prefix: bytes | bytearray) -> int:
    """How long the header after this prefix is. Raises FrameError."""
    magic, length, _, check = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FrameError("not a frame of this protocol")
    if check != block_checksum(bytes(prefix[:_CHECKED])):
        raise FrameError("the prefix is damaged")
    if length > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {length} bytes; {MAX_HEADER_BYTES} are allowed")
    return int(length)


def decode(prefix: bytes | bytearray, header: bytes) -> Message:
    """The message; both parts are read whole, as `header_bytes` says. Raises FrameError."""
    if PREFIX.unpack(prefix)[2] != block_checksum(header):
        raise FrameError("the header is damaged")
    values = _unpack(header)
    if not isinstance(values, tuple) or len(values) < 2 or not _is_whole(values[0], VERSION) or values[0] != VERSION:
        raise FrameError("not a header of this version")
    if not _is_whole(values[1], len(_KINDS) - 1):
        raise FrameError("a frame of unknown kind")
    return _build(_KINDS[values[1]], values[2:])


def _unpack(header: bytes) -> Any:
    try:
        return msgpack.unpackb(
            header,
            use_list=False,
            raw=False,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=0,
            max_array_len=MAX_BLOCKS_PER_FRAME,
            max_map_len=0,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise FrameError(f"the header cannot be decoded: {type(error).__name__}") from error


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _build(kind: type[Message], values: tuple[Any, ...]) -> Message:
    names = [field.name for field in fields(kind)]
    if len(values) != len(names) or not all(_is_legal(name, value) for name, value in zip(names, values, strict=True)):
        raise FrameError(f"not the fields of a {kind.__name__}")
    return kind(*values)


def _is_legal(name: str, value: Any) -> bool:
    match name:
        case "ticket_id" | "reason" | "message":
            return isinstance(value, str)
        case "checksums":
            return (
                isinstance(value, tuple) and 0 < len(value) <= MAX_BLOCKS_PER_FRAME and all(_is_whole(v, _MAX_U64) for v in value)
            )
        case "metadata":
            return isinstance(value, tuple) and len(value) <= 2 * MAX_METADATA and all(isinstance(v, str) for v in value)
        case _:
            return _is_whole(value, _MAX_U32)


def _is_whole(value: Any, maximum: int) -> bool:
    """bool is an int to Python, but not here."""
    return type(value) is int and 0 <= value <= maximum

"""Small checked messages on a raw socket.

A packet is a prefix of 24 bytes (magic, length of the header, XXH3-64 of the header, XXH3-64 of these 16 bytes) and a msgpack
header: an array of version, kind, and the fields of the kind's class in order. Packets come from whoever connects, so the prefix is
checked before the header is read, the header's checksum before it is decoded, and then every value.
"""

import struct
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any, Generic, TypeVar

import msgpack

from kvtransfer.checksum import block_checksum

MAX_HEADER_BYTES = 64 * 1024
MAX_TEXT_BYTES = 512
MAX_ITEMS = 256

PREFIX = struct.Struct("!4sIQQ")
_CHECKED = 16
_MAX_U32 = 2**32 - 1
_MAX_U64 = 2**64 - 1

MessageT = TypeVar("MessageT")


class FrameError(Exception):
    """The bytes are not a frame, or not one that may come here."""


def items(least: int = 0, most: int = MAX_ITEMS) -> Any:
    """A message's field that is a tuple of so many values."""
    return field(metadata={"least": least, "most": most})


class PacketFormat(Generic[MessageT]):
    """One protocol's messages: frozen dataclasses of str, int (32 bits), tuple[int, ...] (64 bits) and tuple[str, ...]."""

    def __init__(self, magic: bytes, version: int, kinds: tuple[type[MessageT], ...]) -> None:
        self._magic = magic
        self._version = version
        self._kinds = kinds
        self._names = {kind: [part.name for part in fields(kind)] for kind in kinds}  # type: ignore[arg-type]
        self._checks = {kind: [_check_of(part) for part in fields(kind)] for kind in kinds}  # type: ignore[arg-type]

    def encode(self, message: MessageT) -> bytes:
        """Prefix and header."""
        values = [getattr(message, name) for name in self._names[type(message)]]
        header: bytes = msgpack.packb([self._version, self._kinds.index(type(message)), *values])
        assert len(header) <= MAX_HEADER_BYTES, "the header is longer than any peer would read"
        return self.prefix(len(header), block_checksum(header)) + header

    def prefix(self, num_header_bytes: int, header_checksum: int) -> bytes:
        """What goes before a header."""
        checked = PREFIX.pack(self._magic, num_header_bytes, header_checksum, 0)[:_CHECKED]
        return checked + block_checksum(checked).to_bytes(8)

    def header_bytes(self, prefix: bytes | bytearray) -> int:
        """How long the header after this prefix is. Raises FrameError."""
        magic, length, _, check = PREFIX.unpack(prefix)
        if magic != self._magic:
            raise FrameError("not a frame of this protocol")
        if check != block_checksum(bytes(prefix[:_CHECKED])):
            raise FrameError("the prefix is damaged")
        if length > MAX_HEADER_BYTES:
            raise FrameError(f"a header of {length} bytes; {MAX_HEADER_BYTES} are allowed")
        return int(length)

    def decode(self, prefix: bytes | bytearray, header: bytes) -> MessageT:
        """The message; both parts are read whole, as `header_bytes` says. Raises FrameError."""
        if PREFIX.unpack(prefix)[2] != block_checksum(header):
            raise FrameError("the header is damaged")
        values = _unpack(header)
        if (
            not isinstance(values, tuple)
            or len(values) < 2
            or not _is_whole(values[0], self._version)
            or values[0] != self._version
        ):
            raise FrameError("not a header of this version")
        if not _is_whole(values[1], len(self._kinds) - 1):
            raise FrameError("a frame of unknown kind")
        return self._build(self._kinds[values[1]], values[2:])

    def _build(self, kind: type[MessageT], values: tuple[Any, ...]) -> MessageT:
        checks = self._checks[kind]
        if len(values) != len(checks) or not all(check(value) for check, value in zip(checks, values, strict=True)):
            raise FrameError(f"not the fields of a {kind.__name__}")
        return kind(*values)


def _unpack(header: bytes) -> Any:
    try:
        return msgpack.unpackb(
            header,
            use_list=False,
            raw=False,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=0,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise FrameError(f"the header cannot be decoded: {type(error).__name__}") from error


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _check_of(part: "Field[Any]") -> Callable[[Any], bool]:
    """Tells whether a value may be that field's."""
    if part.type is str:
        return _is_text
    if part.type is int:
        return _is_small
    least, most = part.metadata["least"], part.metadata["most"]
    items_are_legal = _are_whole if part.type == tuple[int, ...] else _are_texts
    return lambda value: type(value) is tuple and least <= len(value) <= most and items_are_legal(value)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_small(value: Any) -> bool:
    return _is_whole(value, _MAX_U32)


def _are_texts(values: tuple[Any, ...]) -> bool:
    return all(map(_is_text, values))


def _are_whole(values: tuple[Any, ...]) -> bool:
    """Without a step of the interpreter for each: a checksum a block, of which there may be hundreds."""
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MAX_U64)


def _is_whole(value: Any, maximum: int) -> bool:
    """bool is an int to Python, but not here."""
    return type(value) is int and 0 <= value <= maximum

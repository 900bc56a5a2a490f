"""The tcp transport's control frames: what is sent arrives, and nothing else is taken for a frame."""

import contextlib
import random
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer.checksum import block_checksum
from kvtransfer.transports.tcp_frames import (
    MAX_HEADER_BYTES,
    PREFIX,
    BlocksMessage,
    EndMessage,
    ErrorMessage,
    FrameError,
    Message,
    PullMessage,
    WaitMessage,
    decode,
    encode,
    header_bytes,
    prefix,
)

texts = st.text(st.characters(codec="utf-8"), max_size=60)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
messages = st.one_of(
    st.builds(PullMessage, texts, u32, u32),
    st.builds(BlocksMessage, texts, u32, u32, u32, st.lists(u64, min_size=1, max_size=256).map(tuple)),
    st.builds(EndMessage, texts, u32, u32),
    st.builds(WaitMessage, texts, u32),
    st.builds(ErrorMessage, texts, u32, texts, texts, st.lists(texts, max_size=8).map(tuple)),
)


def read(frame: bytes) -> Message:
    """What a peer that received these bytes makes of them."""
    start, header = frame[: PREFIX.size], frame[PREFIX.size :]
    if len(start) < PREFIX.size or header_bytes(start) != len(header):
        raise FrameError("torn")
    return decode(start, header)


def sealed(header: bytes) -> bytes:
    """A frame whose prefix is right, whatever the header."""
    return prefix(len(header), block_checksum(header)) + header


@given(messages)
def test_what_is_sent_arrives(message: Message) -> None:
    assert read(encode(message)) == message


@given(messages, st.data())
def test_no_flipped_bit_goes_unnoticed(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FrameError):
        read(bytes(frame))


def test_of_ten_thousand_flips_in_a_stream_none_is_taken_in() -> None:
    """Header, payload and end, as they travel one after the other."""
    rng = random.Random(3)
    block = rng.randbytes(500)
    blocks, end = encode(BlocksMessage("t" * 32, 1, 0, len(block), (block_checksum(block),))), encode(EndMessage("t" * 32, 1, 7))
    stream = blocks + block + end

    def accepted(received: bytes) -> bool:
        header, payload, last = received[: len(blocks)], received[len(blocks) : -len(end)], received[-len(end) :]
        try:
            message = read(header)
            return isinstance(message, BlocksMessage) and block_checksum(payload) == message.checksums[0] and bool(read(last))
        except FrameError:
            return False

    assert accepted(stream)
    for _ in range(10_000):
        changed = bytearray(stream)
        changed[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        assert not accepted(bytes(changed))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(FrameError):
        read(junk)


@given(st.binary(max_size=200))
@example(b"\x81\xa1a\x01\xa1a\x02")
def test_random_headers_with_a_right_checksum_are_refused_or_legal(header: bytes) -> None:
    try:
        message = read(sealed(header))
    except FrameError:
        return
    assert read(encode(message)) == message


illegal: list[Any] = [
    None,
    {},
    [],
    [1],
    [2, 0, "t", 1, 0],
    [1, 5, "t"],
    [1, -1, "t"],
    [1, True, "t", 1, 0],
    [True, 0, "t", 1, 0],
    [1, 0, "t", 1],
    [1, 0, "t", 1, 0, 0],
    [1, 0, "t", True, 0],
    [1, 0, "t", 1.0, 0],
    [1, 0, "t", -1, 0],
    [1, 0, "t", 2**32, 0],
    [1, 0, b"t", 1, 0],
    [1, 0, None, 1, 0],
    [1, 0, "t" * 513, 1, 0],
    [1, 1, "t", 1, 0, 8, []],
    [1, 1, "t", 1, 0, 8, [1] * 257],
    [1, 1, "t", 1, 0, 8, [-1]],
    [1, 1, "t", 1, 0, 8, ["x"]],
    [1, 1, "t", 1, 0, 8, 3],
    [1, 4, "t", 1, "reason", "message", ["x"] * 33],
    [1, 4, "t", 1, "reason", "message", {"a": "b"}],
    [1, 0, msgpack.ExtType(1, b""), 1, 0],
    [1, 0, msgpack.ExtType(1, b"x"), 1, 0],
    [1, 0, msgpack.Timestamp(1), 1, 0],
]


@pytest.mark.parametrize("values", illegal, ids=range(len(illegal)))
def test_a_well_formed_header_with_illegal_values_is_refused(values: Any) -> None:
    with pytest.raises(FrameError):
        read(sealed(msgpack.packb(values)))


bombs = {
    "array of 2^32": b"\xdd\xff\xff\xff\xff",
    "map of 2^32": b"\xdf\xff\xff\xff\xff",
    "string of 2^32": b"\xdb\xff\xff\xff\xff",
    "binary of 2^32": b"\xc6\xff\xff\xff\xff",
    "extension of 2^32": b"\xc9\xff\xff\xff\xff\x01",
    "depth": b"\x91" * MAX_HEADER_BYTES,
    "many empty arrays": b"\xdc\xff\xff" + b"\x90" * (MAX_HEADER_BYTES - 3),
    "many empty maps": b"\xdc\x01\x00" + b"\x80" * 256,
    "arrays in arrays": (b"\xdc\x00\xff" + b"\x90" * 255) * 200,
    "duplicate keys": b"\x82\xa1a\x01\xa1a\x02",
    "bad utf-8": b"\x95\x01\x00\xa2\xff\xfe\x01\x00",
}


@pytest.mark.parametrize("name", bombs)
def test_bombs_are_refused_without_harm(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            read(sealed(bombs[name][:MAX_HEADER_BYTES]))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_length_is_refused_before_anything_is_read() -> None:
    with pytest.raises(FrameError, match="allowed"):
        header_bytes(prefix(MAX_HEADER_BYTES + 1, 0))
    assert header_bytes(prefix(MAX_HEADER_BYTES, 0)) == MAX_HEADER_BYTES
    with pytest.raises(FrameError, match="protocol"):
        header_bytes(b"HTTP" + prefix(10, 0)[4:])


@settings(max_examples=1000)
@given(st.data())
def test_mutated_real_frames(data: st.DataObject) -> None:
    """Cut, doubled and overwritten: refused, or the frame itself."""
    message = data.draw(messages)
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(FrameError):
        assert read(bytes(frame)) == message

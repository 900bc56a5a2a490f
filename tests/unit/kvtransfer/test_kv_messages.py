"""Messages of KV connections: what is sent arrives, and nothing else is taken for a frame."""

import contextlib
import io
import random
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer.checksum import block_checksum
from kvtransfer.frames import NewsFrame
from kvtransfer.intake import Sequencer
from kvtransfer.kv_messages import (
    MAX_HEADER_BYTES,
    PREFIX,
    ErrorMessage,
    FrameError,
    Message,
    NewsMessage,
    PullMessage,
    decode,
    encode,
    header_bytes,
    prefix,
)
from kvtransfer.pull_state import InterruptedPullError

texts = st.text(st.characters(codec="utf-8"), max_size=60)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
messages = st.one_of(
    st.builds(PullMessage, texts, u32, u32, u32),
    st.builds(
        NewsMessage, texts, u32, u32, u32, u32, u32, st.lists(u64, max_size=256).map(tuple), st.lists(u64, max_size=1).map(tuple)
    ),
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


NUM_CORRUPTIONS = 10_000
BLOCK_BYTES = 500


def stream(rng: random.Random, ticket_id: str, epoch: int) -> list[bytes]:
    """A pull's answer in parts, as they travel one after the other: of three blocks the header and the bytes, each with the
    checksum of the block before; then the last checksum and the first token."""
    parts, sums = [], list[int]()
    for index in range(3):
        block = rng.randbytes(BLOCK_BYTES)
        parts += [encode(NewsMessage(ticket_id, epoch, index, 1, BLOCK_BYTES, max(0, index - 1), tuple(sums[-1:]), ())), block]
        sums.append(block_checksum(block))
    return [*parts, encode(NewsMessage(ticket_id, epoch, 3, 0, BLOCK_BYTES, 2, tuple(sums[-1:]), (7,)))]


def admitted(received: bytes, ticket_id: str, epoch: int) -> tuple[list[bytes], int] | None:
    """What a consumer of that ticket takes in: its blocks and the first token; None if it refuses the stream."""
    sequencer, blocks, sums = Sequencer(epoch, 0, 3), list[bytes](), list[int]()
    reader = io.BytesIO(received)
    try:
        while not sequencer.complete:
            start = reader.read(PREFIX.size)
            if len(start) < PREFIX.size:
                return None
            message = decode(start, reader.read(header_bytes(start)))
            if not isinstance(message, NewsMessage) or (message.ticket_id, message.epoch) != (ticket_id, epoch):
                return None
            token = message.first_token_id[0] if message.first_token_id else None
            frame = NewsFrame(
                epoch, message.first_block_index, message.num_blocks, message.first_checksum_index, message.checksums, token
            )
            new = sequencer.accept(frame)
            received_blocks = [reader.read(message.block_bytes) for _ in range(message.num_blocks)]
            blocks += received_blocks[frame.num_blocks - new.num_blocks :]
            sums += new.checksums
            if message.block_bytes != BLOCK_BYTES:
                return None
    except (FrameError, InterruptedPullError):
        return None
    right = [block_checksum(block) for block in blocks] == sums
    return (blocks, sequencer.first_token_id or 0) if right else None


def corrupt(rng: random.Random, parts: list[bytes], older: list[bytes], foreign: list[bytes]) -> bytes:
    """The stream flipped, cut short, spliced with another ticket's or an older attempt's, or with parts of its own out of place."""
    whole = bytearray(b"".join(parts))
    at = rng.randrange(len(whole))
    match rng.choice(["flip", "truncate", "remove", "insert", "splice", "replay", "swap"]):
        case "flip":
            whole[at] ^= 1 << rng.randrange(8)
        case "truncate":
            del whole[at:]
        case "remove":
            del whole[at : at + rng.randrange(1, 600)]
        case "insert":
            whole[at:at] = rng.randbytes(rng.randrange(1, 600))
        case "splice":
            whole[at:] = b"".join(foreign)[at:]
        case "replay":
            place = rng.randrange(len(parts))
            return b"".join([*parts[:place], *older[place:]]) if rng.random() < 0.5 else b"".join([*older[:place], *parts[place:]])
        case "swap":
            first, second = rng.sample(range(len(parts)), 2)
            parts = list(parts)
            parts[first], parts[second] = parts[second], parts[first]
            return b"".join(parts)
    return bytes(whole)


def test_of_ten_thousand_corruptions_none_is_admitted() -> None:
    rng = random.Random(3)
    parts, older, foreign = (stream(rng, *name) for name in (("t" * 32, 2), ("t" * 32, 1), ("u" * 32, 2)))
    right = ([parts[1], parts[3], parts[5]], 7)
    assert admitted(b"".join(parts), "t" * 32, 2) == right
    num_refused = 0
    for _ in range(NUM_CORRUPTIONS):
        received = corrupt(rng, parts, older, foreign)
        if received == b"".join(parts):
            continue
        taken_in = admitted(received, "t" * 32, 2)
        assert taken_in in (None, right), "a wrong byte was taken in"
        num_refused += taken_in is None
    assert num_refused > 0.98 * NUM_CORRUPTIONS


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
    [2],
    [1, 0, "t", 1, 0, 0],
    [3, 0, "t", 1, 0, 0],
    [2, 3, "t"],
    [2, -1, "t"],
    [2, True, "t", 1, 0],
    [True, 0, "t", 1, 0, 0],
    [2, 0, "t", 1, 0],
    [2, 0, "t", 1, 0, 0, 0],
    [2, 0, "t", True, 0, 0],
    [2, 0, "t", 1.0, 0, 0],
    [2, 0, "t", -1, 0, 0],
    [2, 0, "t", 2**32, 0, 0],
    [2, 0, b"t", 1, 0, 0],
    [2, 0, None, 1, 0, 0],
    [2, 0, "t" * 513, 1, 0, 0],
    [2, 1, "t", 1, 0, 1, 8, 0, [1] * 257, []],
    [2, 1, "t", 1, 0, 1, 8, 0, [-1], []],
    [2, 1, "t", 1, 0, 1, 8, 0, ["x"], []],
    [2, 1, "t", 1, 0, 1, 8, 0, 3, []],
    [2, 1, "t", 1, 0, 1, 8, 0, [], [1, 2]],
    [2, 1, "t", 1, 0, 1, 8, 0, [], 1],
    [2, 1, "t", 1, 0, 1, 8, 0, []],
    [2, 2, "t", 1, "reason", "message", ["x"] * 33],
    [2, 2, "t", 1, "reason", "message", {"a": "b"}],
    [2, 0, msgpack.ExtType(1, b""), 1, 0, 0],
    [2, 0, msgpack.ExtType(1, b"x"), 1, 0, 0],
    [2, 0, msgpack.Timestamp(1), 1, 0, 0],
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
    "bad utf-8": b"\x96\x02\x00\xa2\xff\xfe\x01\x00\x00",
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

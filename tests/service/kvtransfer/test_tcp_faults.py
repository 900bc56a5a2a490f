"""The tcp transport when the network, or whoever connects, does harm."""

import asyncio
import random
import socket
from dataclasses import replace

import pytest

from kvtransfer import connections, kv_server
from kvtransfer.checksum import block_checksum
from kvtransfer.frames import NewsFrame
from kvtransfer.kv_messages import (
    MAX_HEADER_BYTES,
    PREFIX,
    ErrorMessage,
    NewsMessage,
    PullMessage,
    decode,
    encode,
    header_bytes,
    prefix,
)
from kvtransfer.ticket import KvTicket, TcpOffer
from tandem.errors import Reason, TandemError
from tests.faults.proxy import cut_after, flip_at, proxy
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, Transfer, transfer

MINE = tuple(range(20, 28))


def port_of(ticket: KvTicket) -> int:
    return next(offer.port for offer in ticket.offers if isinstance(offer, TcpOffer))


def through(ticket: KvTicket, port: int) -> KvTicket:
    return replace(ticket, offers=(TcpOffer("127.0.0.1", port),))


def layout_of_stream(ticket: KvTicket) -> dict[str, int]:
    """Byte positions in the answer to a pull of a sealed ticket: one frame, and the blocks."""
    checksums = (2**64 - 1,) * len(ticket.block_ids)
    header = len(encode(NewsMessage(ticket.ticket_id, 1, 0, len(checksums), LAYOUT.block_bytes, 0, checksums, (FIRST_TOKEN,))))
    payload = len(ticket.block_ids) * LAYOUT.block_bytes
    return {"payload": header, "total": header + payload}


@pytest.mark.parametrize(
    "place",
    ["nothing", "prefix", "header", "first byte", "mid block", "block edge", "last byte"],
)
async def test_a_torn_stream_is_resumed_from_the_last_verified_block(place: str) -> None:
    async with transfer("tcp") as at:
        ticket = await at.sealed()
        where = layout_of_stream(ticket)
        position = {
            "nothing": 0,
            "prefix": 7,
            "header": PREFIX.size + 20,
            "first byte": where["payload"] + 1,
            "mid block": where["payload"] + 3 * LAYOUT.block_bytes + 99,
            "block edge": where["payload"] + 3 * LAYOUT.block_bytes,
            "last byte": where["total"] - 1,
        }[place]
        async with proxy(port_of(ticket), cut_after(position)) as between:
            result = await at.puller.pull(through(ticket, between.port), MINE)
        assert result.first_token_id == FIRST_TOKEN and at.arrived(ticket, MINE)
        assert (between.num_connections, result.num_resumed) == (2, 1)


async def test_a_stream_torn_twice_is_given_up() -> None:
    async with transfer("tcp") as at:
        ticket = await at.sealed()
        async with proxy(port_of(ticket), cut_after(9_000), cut_after(100)) as between:
            with pytest.raises(TandemError) as caught:
                await at.puller.pull(through(ticket, between.port), MINE)
        assert caught.value.reason is Reason.TRANSFER_INTERRUPTED
        await at.until(lambda: at.num_readers(ticket) == 0)


async def test_flipped_bits_are_never_taken_in() -> None:
    """Anywhere in headers or payload: what the pull returns is right, whatever it took."""
    async with transfer("tcp") as at:
        ticket = await at.sealed()
        total = layout_of_stream(ticket)["total"]
        rng = random.Random(7)
        num_refetched = num_resumed = 0
        for index in range(150):
            position = rng.randrange(total) if index % 3 else rng.randrange(120)
            async with proxy(port_of(ticket), flip_at(position, 1 << rng.randrange(8))) as between:
                result = await at.puller.pull(through(ticket, between.port), MINE)
            assert result.first_token_id == FIRST_TOKEN and at.arrived(ticket, MINE)
            num_refetched += result.num_refetched
            num_resumed += result.num_resumed
            assert result.num_refetched + result.num_resumed == 1, "every injury is counted"
            for block in MINE:
                at.target.block_view(block)[:] = bytes(LAYOUT.block_bytes)
        assert num_refetched > 20 and num_resumed > 20


async def test_a_producer_that_falls_silent_is_given_up_within_the_stall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_S", 0.05)
    async with transfer("tcp") as at:
        silent = socket.create_server(("127.0.0.1", 0))
        began = asyncio.get_running_loop().time()
        with silent, pytest.raises(TandemError) as caught:
            await at.puller.pull(through(at.complete(), silent.getsockname()[1]), MINE)
        assert caught.value.reason is Reason.TRANSFER_INTERRUPTED
        assert asyncio.get_running_loop().time() - began < 2.0


async def test_a_ticket_that_ends_before_its_blocks_are_sent_is_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error told behind the frame would be taken for bytes of a block, of which the consumer would wait for the rest."""
    whole = kv_server._news
    async with transfer("tcp") as at:
        ticket = await at.sealed()

        def last(ticket_id: str, frame: NewsFrame, block_bytes: int) -> NewsMessage:
            at.producer.release(ticket.ticket_id, ticket.epoch)
            return whole(ticket_id, frame, block_bytes)

        monkeypatch.setattr(kv_server, "_news", last)
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert caught.value.reason is Reason.TICKET_NOT_FOUND
        assert [row.resumed for row in at.puller.counters()] == [1]


async def test_a_slow_prefill_is_not_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life keep a pull waiting far beyond the stall time."""
    signs: list[NewsFrame] = []
    whole = kv_server._news

    def counted(ticket_id: str, frame: NewsFrame, block_bytes: int) -> NewsMessage:
        signs.append(frame)
        return whole(ticket_id, frame, block_bytes)

    monkeypatch.setattr(connections, "STALL_S", 0.5)
    monkeypatch.setattr(kv_server, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(kv_server, "_news", counted)
    async with transfer("tcp") as at:
        ticket = at.grant()
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: len(signs) > 60)
        assert not pulling.done()
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        await pulling


class Scripted:
    """A producer that answers every request with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = await reader.readexactly(PREFIX.size)
        request = decode(start, await reader.readexactly(header_bytes(start)))
        assert isinstance(request, PullMessage)
        writer.write(self.answer)
        await writer.drain()
        writer.close()


async def pull_from_script(at: Transfer, ticket: KvTicket, *messages: bytes) -> Reason | int:
    server = await asyncio.start_server(Scripted(b"".join(messages)).serve, "127.0.0.1", 0)
    async with server:
        try:
            return (await at.puller.pull(through(ticket, server.sockets[0].getsockname()[1]), MINE)).first_token_id
        except TandemError as error:
            return error.reason


async def test_repeated_frames_do_no_harm_and_foreign_ones_end_the_stream() -> None:
    async with transfer("tcp") as at:
        ticket = at.complete()
        size, name = LAYOUT.block_bytes, ticket.ticket_id
        blocks = [bytes(at.source.block_view(block)) for block in ticket.block_ids]
        sums = tuple(block_checksum(block) for block in blocks)

        def run(first: int, last: int, ticket_id: str = name, epoch: int = 1, block_bytes: int = size) -> bytes:
            message = NewsMessage(ticket_id, epoch, first, last - first, block_bytes, first, sums[first:last], ())
            return encode(message) + b"".join(blocks[first:last])

        def end(epoch: int = 1) -> bytes:
            return encode(NewsMessage(name, epoch, 8, 0, size, 8, (), (5,)))

        wait = encode(NewsMessage(name, 1, 0, 0, size, 0, (), ()))
        assert await pull_from_script(at, ticket, wait, run(0, 4), run(0, 4), run(2, 8), wait, end()) == 5
        assert at.arrived(ticket, MINE)
        for bad in (
            run(4, 8) + run(0, 4) + end(),
            run(0, 4) + end(),
            run(0, 8, epoch=2) + end(),
            run(0, 8, ticket_id="f" * 32) + end(),
            run(0, 8, block_bytes=size // 2) + end(),
            run(0, 8) + end(epoch=2),
            run(0, 8),
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            prefix(MAX_HEADER_BYTES + 1, 0),
            encode(PullMessage(name, 1, 0, 1)),
        ):
            assert await pull_from_script(at, ticket, bad) is Reason.TRANSFER_INTERRUPTED
        gone = encode(ErrorMessage(name, 1, "TICKET_NOT_FOUND", "gone", ("ticket", "x")))
        assert await pull_from_script(at, ticket, gone) is Reason.TICKET_NOT_FOUND
        assert await pull_from_script(at, ticket, encode(ErrorMessage(name, 1, "NEWER", "?", ()))) is Reason.INTERNAL


def junk() -> list[bytes]:
    """Bytes that are no request: random, other protocols, real frames cut, changed or out of place."""
    rng = random.Random(11)
    request = encode(PullMessage("a" * 32, 1, 0, 1))
    random_bytes = [rng.randbytes(rng.randrange(1, 300)) for _ in range(60)]
    mutated = []
    for _ in range(120):
        frame = bytearray(request)
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        mutated.append(bytes(frame))
    bomb = b"\xdd\xff\xff\xff\xff"
    return [
        *random_bytes,
        *mutated,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        encode(NewsMessage("a", 1, 0, 1, 1, 0, (1,), ())) + b"x",
        prefix(MAX_HEADER_BYTES + 1, 0),
        prefix(2**32 - 1, 0),
        prefix(len(bomb), block_checksum(bomb)) + bomb,
    ]


async def send_junk(port: int, data: bytes) -> bytes:
    """Sends, ends the sending side, and reads whatever comes until the peer closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_junk_is_cut_off_and_counted_and_serving_goes_on() -> None:
    async with transfer("tcp") as at:
        ticket = at.complete()
        port = port_of(ticket)
        for data in junk():
            assert await send_junk(port, data) == b""
        assert at.producer.counters().refused_connections > 100
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)


async def test_a_request_for_an_unknown_ticket_gets_an_error_and_no_byte_of_kv() -> None:
    async with transfer("tcp") as at:
        ticket = at.complete()
        answer = await ask(port_of(ticket), PullMessage("0" * 32, 1, 0, 1))
        assert isinstance(answer, ErrorMessage) and answer.reason == "TICKET_NOT_FOUND"
        beyond = await ask(port_of(ticket), PullMessage(ticket.ticket_id, 1, 9, 1))
        assert isinstance(beyond, ErrorMessage) and beyond.reason == "INVALID_REQUEST"


async def ask(port: int, request: PullMessage) -> object:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode(request))
    start = await reader.readexactly(PREFIX.size)
    answer = decode(start, await reader.readexactly(header_bytes(start)))
    writer.close()
    return answer


@pytest.mark.parametrize("sent", [b"", encode(PullMessage("a" * 32, 1, 0, 1))[:20]])
async def test_whoever_says_nothing_or_half_a_request_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STALL_S", "FIRST_REQUEST_S"):
        monkeypatch.setattr(kv_server, name, 0.05)
    async with transfer("tcp") as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(at.complete()))
        writer.write(sent)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_is_not_used_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be half open: its peer vanished behind a dead link."""
    monkeypatch.setattr(kv_server, "IDLE_S", 0.05)
    async with transfer("tcp") as at:
        await at.puller.pull(at.complete(), MINE)
        await at.until(lambda: not at.producer._server._tasks)


async def test_a_consumer_that_goes_away_while_it_waits_is_noticed() -> None:
    async with transfer("tcp") as at:
        ticket = at.grant()
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(ticket))
        writer.write(encode(PullMessage(ticket.ticket_id, 1, 0, 1)))
        await at.until(lambda: at.num_readers(ticket) == 1)
        writer.close()
        await at.until(lambda: at.num_readers(ticket) == 0)


async def test_a_consumer_that_does_not_read_is_cut_off_and_its_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_server, "STALL_S", 0.05)
    async with transfer("tcp") as at:
        ticket = at.complete(tuple(range(40)))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port_of(ticket)))
        request = encode(PullMessage(ticket.ticket_id, 1, 0, 1))
        for _ in range(200):
            await loop.sock_sendall(sock, request)
        at.wait(0)
        await at.until(lambda: not at.producer._server._tasks)
        sock.close()
        assert at.num_readers(ticket) == 0
        at.wait(5.0)
        assert at.freed == [ticket.block_ids]


async def test_connections_are_kept_for_later_pulls() -> None:
    async with transfer("tcp") as at, proxy(port_of(at.complete())) as between:
        for _ in range(3):
            await at.puller.pull(through(at.complete(), between.port), MINE)
        assert between.num_connections == 1
        await at.puller.close()


async def test_a_kept_connection_that_the_producer_closed_is_not_used() -> None:
    async with transfer("tcp") as at:
        await at.puller.pull(at.complete(), MINE)
        for task in at.producer._server._tasks:
            task.cancel()
        await at.until(lambda: not at.producer._server._tasks)
        ticket = at.complete()
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)

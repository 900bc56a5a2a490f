"""A KV connection over a real socket: however bytes are cut on their way, messages and blocks come out whole; and it rests."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvtransfer.connection import Connection
from kvtransfer.kv_messages import FrameError, NewsMessage, PullMessage, ReleaseMessage, encode

BLOCK = bytes(range(256)) * 40
NEWS = NewsMessage("t" * 32, 1, 0, 1, len(BLOCK), 0, (2**64 - 1,), (7,))
SHORT_S = 0.2


@asynccontextmanager
async def connected(stall_s: float = 5.0) -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection, and the bare socket at its other end."""
    ours, theirs = tcp_pair()
    connection = Connection(ours, stall_s)
    try:
        yield connection, theirs
    finally:
        connection.close()
        theirs.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


async def trickle(sock: socket.socket, data: bytes, rng: random.Random) -> None:
    """Sends the bytes in parts of any size, with pauses."""
    start = 0
    while start < len(data):
        size = rng.choice((1, 7, 24, 100, 5000))
        await asyncio.get_running_loop().sock_sendall(sock, data[start : start + size])
        start += size
        await asyncio.sleep(rng.choice((0, 0, 0.001)))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(10))
async def test_messages_and_blocks_come_out_whole(seed: int) -> None:
    """What is behind a message is read with it: the next message, or the beginning of a block."""
    async with connected() as (connection, theirs):
        sending = asyncio.create_task(trickle(theirs, (encode(NEWS) + BLOCK) * 3 + encode(NEWS) * 2, random.Random(seed)))
        target = bytearray(len(BLOCK))
        for _ in range(3):
            assert await connection.receive() == NEWS
            await connection.receive_into(memoryview(target))
            assert target == BLOCK
        assert [await connection.receive(), await connection.receive()] == [NEWS, NEWS]
        await sending
        assert connection.quiet


async def test_a_message_that_begins_and_does_not_end_is_given_up_in_time() -> None:
    """Each byte that comes is no reason to wait for longer."""
    async with connected(SHORT_S) as (connection, theirs):

        async def drip() -> None:
            for byte in encode(NEWS)[:-1]:
                theirs.send(bytes([byte]))
                await asyncio.sleep(SHORT_S / 10)

        loop = asyncio.get_running_loop()
        began, dripping = loop.time(), asyncio.create_task(drip())
        with pytest.raises(TimeoutError):
            await connection.receive(wait_s=10.0)
        assert loop.time() - began < 3 * SHORT_S
        dripping.cancel()


async def test_the_end_in_the_middle_of_a_message_is_an_error() -> None:
    async with connected() as (connection, theirs):
        theirs.send(encode(NEWS)[:-1])
        theirs.close()
        with pytest.raises(ConnectionResetError):
            await connection.receive()


async def test_rubbish_behind_a_message_is_noticed_when_its_turn_comes() -> None:
    async with connected() as (connection, theirs):
        theirs.send(encode(NEWS) + b"GET / HTTP/1.1 and more of it")
        assert await connection.receive() == NEWS
        assert not connection.quiet, "it was read ahead"
        with pytest.raises(FrameError):
            await connection.receive()


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with connected() as (connection, theirs):
        frame = encode(NEWS)
        theirs.send(frame[:30])
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0.02)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        theirs.send(frame[30:])
        assert await connection.receive() == NEWS


async def test_who_watches_hears_of_the_end_once() -> None:
    async with connected() as (connection, theirs):
        ends = list[int]()
        connection.watch(lambda: ends.append(1))
        theirs.close()
        await until(lambda: bool(ends))
        await asyncio.sleep(0.02)
        assert ends == [1]


async def test_who_watches_may_close_it_at_the_end() -> None:
    async with connected() as (connection, theirs):
        connection.watch(connection.close)
        theirs.close()
        await until(lambda: connection._socket.fileno() < 0)


async def test_bytes_that_nobody_wants_keep_the_loop_no_busier() -> None:
    """A loop that is told of them again and again would spin."""
    async with connected() as (connection, theirs):
        told, on_bytes = list[int](), connection._on_bytes

        def counted() -> None:
            told.append(1)
            on_bytes()

        connection._on_bytes = counted  # type: ignore[method-assign]
        theirs.send(encode(NEWS))
        assert await connection.receive() == NEWS
        for _ in range(3):
            theirs.send(encode(ReleaseMessage("t" * 32, 1)))
            await asyncio.sleep(0.02)
        assert len(told) <= 2
        assert [await connection.receive() for _ in range(3)] == [ReleaseMessage("t" * 32, 1)] * 3


async def test_listening_goes_on_from_one_message_to_the_next() -> None:
    """To begin and to end it are a system call each."""
    async with connected() as (connection, theirs):
        loop = asyncio.get_running_loop()
        begun, add_reader = list[int](), loop.add_reader

        def counted(*arguments: object) -> None:
            begun.append(1)
            add_reader(*arguments)  # type: ignore[arg-type]

        loop.add_reader = counted  # type: ignore[method-assign, assignment]
        try:
            for _ in range(20):
                receiving = asyncio.create_task(connection.receive())
                await asyncio.sleep(0.002)
                theirs.send(encode(PullMessage("t" * 32, 1, 0, 0)))
                await receiving
        finally:
            loop.add_reader = add_reader  # type: ignore[method-assign]
        assert len(begun) == 1

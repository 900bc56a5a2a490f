"""What a reader is told, and when: at once by whoever brings the news, or by its own task where the socket is full."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from kvtransfer import kv_server
from kvtransfer.connection import Connection
from kvtransfer.kv_messages import NewsMessage
from kvtransfer.kv_server import Telling
from kvtransfer.ledger import Entry
from kvtransfer.outbox import Outbox
from kvtransfer.states import State
from tandem.errors import Reason, TandemError
from tests.service.kvtransfer.test_connection import tcp_pair

NUM_BLOCKS = 4_000
TICKET = "t" * 32


@dataclass
class Told:
    """A ticket's outbox, the task that tells of it, and the consumer's connection."""

    outbox: Outbox
    telling: Telling
    running: "asyncio.Task[None]"
    consumer: Connection

    def ready(self, num_blocks: int) -> None:
        """So many blocks are computed, and their checksums are taken."""
        first, self.outbox.entry.num_ready_blocks = self.outbox.num_checksums, num_blocks
        self.outbox.add(first, np.arange(first, num_blocks, dtype=np.uint64))

    def finish(self) -> None:
        self.outbox.entry.first_token_id = 7
        self.outbox.entry.state = State.READY
        self.outbox.notify()

    async def hear(self) -> NewsMessage:
        message = await self.consumer.receive()
        assert isinstance(message, NewsMessage)
        return message


@asynccontextmanager
async def telling(*, room_bytes: int = 0) -> AsyncIterator[Told]:
    """The producer's task waits for news. `room_bytes`: about how much its socket takes while the consumer does not read."""
    ours, theirs = tcp_pair()
    if room_bytes:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room_bytes)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room_bytes)
    producer, consumer = Connection(ours, 5.0), Connection(theirs, 5.0)
    outbox = Outbox(Entry(TICKET, 1, tuple(range(NUM_BLOCKS))))
    with outbox.reading(0) as reading:
        teller = Telling(producer, TICKET, 8, reading, None)
        running = asyncio.create_task(teller.run())
        await asyncio.sleep(0)
        try:
            yield Told(outbox, teller, running, consumer)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    producer.close()
    consumer.close()


async def test_news_is_under_way_when_the_call_that_brings_it_returns() -> None:
    async with telling() as at:
        at.ready(3)
        assert not at.consumer.quiet, "no task had a turn"
        message = await at.hear()
        assert (message.first_block_index, message.num_blocks, message.checksums) == (0, 3, (0, 1, 2))
        assert not at.running.done()


async def test_the_task_ends_when_all_was_told() -> None:
    async with telling() as at:
        at.ready(NUM_BLOCKS)
        at.finish()
        await at.running


async def test_what_the_socket_does_not_take_comes_later_whole_and_in_order() -> None:
    """The consumer reads only when everything is ready; until then the socket holds a part, which may end anywhere."""
    async with telling(room_bytes=4096) as at:
        for num_blocks in range(1, NUM_BLOCKS + 1):
            at.ready(num_blocks)
            if num_blocks % 500 == 0:
                await asyncio.sleep(0)
        at.finish()
        assert not at.running.done(), "the socket took everything"
        told = list[int]()
        while len(told) < NUM_BLOCKS:
            message = await at.hear()
            assert message.first_block_index == message.first_checksum_index == len(told)
            told += message.checksums
        assert told == list(range(NUM_BLOCKS))
        await at.running


async def test_a_lost_consumer_does_not_hurt_who_brings_news() -> None:
    async with telling() as at:
        at.consumer.close()
        with pytest.raises(OSError):
            for num_blocks in range(1, NUM_BLOCKS):
                at.ready(num_blocks)
                if at.running.done():
                    break
                await asyncio.sleep(0)
            await at.running


async def test_the_error_of_a_ticket_is_the_tasks() -> None:
    async with telling() as at:
        at.outbox.entry.error = TandemError(Reason.CANCELLED, "the prefill was cancelled")
        at.outbox.notify()
        with pytest.raises(TandemError, match="cancelled"):
            await at.running


async def test_what_was_told_whole_is_no_error_if_the_ticket_ends_before_the_task_has_its_turn() -> None:
    """Else an error would lie on a connection that the consumer has done with, and be taken for the next pull's answer."""
    async with telling() as at:
        at.finish()
        while (first := at.outbox.num_checksums) < NUM_BLOCKS:
            at.ready(min(first + 100, NUM_BLOCKS))
        at.outbox.entry.error = TandemError(Reason.CANCELLED, "the prefill was cancelled")
        at.outbox.notify()
        await at.running


async def test_a_sign_of_life_holds_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_server, "HEARTBEAT_S", 0.01)
    async with telling() as at:
        at.ready(1)
        first, sign = await at.hear(), await at.hear()
        assert (first.num_blocks, sign.num_blocks, sign.checksums, sign.first_token_id) == (1, 0, (), ())
        at.ready(2)
        while not (message := await at.hear()).num_blocks:
            pass
        assert (message.first_block_index, message.num_blocks) == (1, 1)


async def test_news_that_comes_as_a_sign_of_life_is_due_is_told_once() -> None:
    async with telling() as at:
        assert at.telling._waiting is not None
        kv_server._run_out(at.telling._waiting)
        at.ready(1)
        assert (await at.hear()).num_blocks == 1
        at.ready(2)
        message = await at.hear()
        assert (message.first_block_index, message.num_blocks) == (1, 1)


async def test_a_cancelled_task_hears_no_more() -> None:
    async with telling() as at:
        at.running.cancel()
        at.ready(1)
        await asyncio.gather(at.running, return_exceptions=True)
        at.ready(2)
        assert at.consumer.quiet

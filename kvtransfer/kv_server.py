"""The producer's KV port: tells of a ticket's blocks, and in the tcp transport sends them."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Protocol

from kvtransfer.connection import Connection
from kvtransfer.frames import NewsFrame
from kvtransfer.kv_messages import MAX_METADATA, MAX_TEXT_BYTES, ErrorMessage, FrameError, NewsMessage, PullMessage, ReleaseMessage
from kvtransfer.outbox import Reading
from kvtransfer.staging import Stage
from llm.kv.block_arrays import BlockIds
from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)

STALL_S = 2.0
HEARTBEAT_S = 0.5
FIRST_REQUEST_S = 5.0
# An idle connection whose peer vanished behind a dead link is closed after this; a living consumer opens another when it needs one.
IDLE_S = 8.0
MAX_CONNECTIONS = 1024
ACCEPT_PAUSE_S = 0.1


class Source(Protocol):
    """What is served: see KvProducer."""

    def reading(self, ticket_id: str, epoch: int, first_block_index: int) -> AbstractContextManager[Reading]: ...

    def block_ids(self, ticket_id: str, epoch: int) -> BlockIds: ...

    def check(self, ticket_id: str, epoch: int) -> None: ...

    def release(self, ticket_id: str, epoch: int) -> None: ...


class KvServer:
    """Serves whoever names a ticket. A peer that sends anything else is cut off and counted.

    `sends_blocks`: whether the tcp transport is offered; else the port only tells of blocks.
    """

    def __init__(self, stage: Stage, block_bytes: int, source: Source, host: str, *, sends_blocks: bool) -> None:
        self.num_refused = 0
        self._sends_blocks = sends_blocks
        self._stage = stage
        self._block_bytes = block_bytes
        self._source = source
        self._host = host
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def start(self) -> int:
        """Listens on a free port of the host's first address and returns it. Raises OSError."""
        loop = asyncio.get_running_loop()
        family, _, _, _, address = (await loop.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM))[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=128)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """Stops listening and cuts every connection."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._pause(error)
            return
        sock.setblocking(False)
        if len(self._tasks) >= MAX_CONNECTIONS:
            self.num_refused += 1
            sock.close()
            return
        task = asyncio.create_task(self._serve(Connection(sock, STALL_S)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _pause(self, error: OSError) -> None:
        """Out of descriptors, mostly: the waiting connection stays ready, so accepting at once would spin."""
        logger.warning("cannot accept a connection: %s", error)
        loop, listener = asyncio.get_running_loop(), self._listener
        assert listener is not None
        loop.remove_reader(listener)
        loop.call_later(ACCEPT_PAUSE_S, lambda: self._listener is listener and loop.add_reader(listener, self._accept))

    async def _serve(self, connection: Connection) -> None:
        wait_s = FIRST_REQUEST_S
        try:
            while True:
                match await connection.receive(wait_s):
                    case PullMessage() as request:
                        await self._answer(connection, request)
                    case ReleaseMessage(ticket_id, epoch):
                        with contextlib.suppress(TandemError):  # of another epoch; the ledger counts it
                            self._source.release(ticket_id, epoch)
                    case _:
                        raise FrameError("only a consumer's messages may come here")
                wait_s = IDLE_S
        except FrameError as error:
            self.num_refused += 1
            logger.info("a connection to the KV port was closed: %s", str(error))
        except OSError as error:
            logger.debug("a connection to the KV port ended: %s", str(error))
        finally:
            connection.close()

    async def _answer(self, connection: Connection, request: PullMessage) -> None:
        """One pull. The consumer's going away cancels this task, so that the ticket is not held while nothing is sent."""
        task = asyncio.current_task()
        assert task is not None
        connection.watch(task.cancel)
        try:
            await self._send(connection, request)
        except TandemError as error:
            await connection.send(_error_message(request, error))
        finally:
            connection.unwatch()

    async def _send(self, connection: Connection, request: PullMessage) -> None:
        if request.with_blocks and not self._sends_blocks:
            raise TandemError(Reason.INVALID_REQUEST, "this producer does not send blocks by tcp")
        ticket_id, epoch = request.ticket_id, request.epoch
        with self._source.reading(ticket_id, epoch, request.first_block_index) as reading:
            send_blocks = partial(self._send_blocks, connection, ticket_id) if request.with_blocks else None
            await Telling(connection, ticket_id, self._block_bytes, reading, send_blocks).run()

    async def _send_blocks(self, connection: Connection, ticket_id: str, frame: NewsFrame) -> None:
        epoch, first, last = frame.epoch, frame.first_block_index, frame.first_block_index + frame.num_blocks
        try:
            block_ids = self._source.block_ids(ticket_id, epoch)[first:last]
            async with aclosing(self._stage.lend(block_ids)) as runs:
                async for run in runs:
                    await connection.send_blocks(run, lambda: self._source.check(ticket_id, epoch))
        except TandemError as error:
            # The consumer expects bytes of blocks now; only the connection's end can tell it.
            raise ConnectionAbortedError(error.message) from error


class Telling:
    """The answer to one pull.

    News that no blocks follow goes to the socket in the very call that brings it, and not by way of a task that is woken for it.
    """

    def __init__(
        self,
        connection: Connection,
        ticket_id: str,
        block_bytes: int,
        reading: Reading,
        send_blocks: Callable[[NewsFrame], Awaitable[None]] | None,
    ) -> None:
        self._connection = connection
        self._ticket_id = ticket_id
        self._block_bytes = block_bytes
        self._reading = reading
        self._send_blocks = send_blocks
        self._waiting: asyncio.Future[bool] | None = None
        """The task, while it knows of nothing to tell."""
        self._error: Exception | None = None

    async def run(self) -> None:
        """Returns when everything was told. Raises the error that ended the ticket, or OSError."""
        self._reading.heard = self._heard
        while True:
            await self._connection.flush()
            if self._reading.complete:
                return
            if self._send_blocks is not None:
                await self._tell_with_blocks(self._send_blocks)
            elif not self._tell_at_once():
                continue
            if self._reading.complete:
                return
            if not await self._news_within(HEARTBEAT_S) and not (frame := self._reading.news()).has_news:
                await self._connection.send(self._message(frame))

    def _heard(self) -> None:
        """There may be news. While the task is at work it looks itself."""
        waiting = self._waiting
        if waiting is None or waiting.done():
            return
        try:
            told = self._send_blocks is None and self._tell_at_once()
        except Exception as error:  # it is the task's, and must not hurt who brings the news
            told, self._error = False, error
        if not told or self._reading.complete:
            waiting.set_result(True)

    def _tell_at_once(self) -> bool:
        """Whether the socket took all that there is."""
        while (frame := self._reading.news()).has_news:
            taken = self._connection.send_at_once(self._message(frame))
            self._reading.told(frame)
            if not taken:
                return False
        return True

    async def _tell_with_blocks(self, send_blocks: Callable[[NewsFrame], Awaitable[None]]) -> None:
        while (frame := self._reading.news()).has_news:
            await self._connection.send(self._message(frame))
            if frame.num_blocks:
                await send_blocks(frame)
            self._reading.told(frame)

    async def _news_within(self, wait_s: float) -> bool:
        """Whether there is something to do for the task before so long. Raises what telling at once failed with."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bool] = loop.create_future()
        self._waiting = waiting
        timer = loop.call_later(wait_s, _run_out, waiting)
        try:
            heard = await waiting
        finally:
            timer.cancel()
            self._waiting = None
        if self._error is not None:
            raise self._error
        return heard

    def _message(self, frame: NewsFrame) -> NewsMessage:
        return _news(self._ticket_id, frame, self._block_bytes)


def _run_out(waiting: "asyncio.Future[bool]") -> None:
    if not waiting.done():
        waiting.set_result(False)


def _news(ticket_id: str, frame: NewsFrame, block_bytes: int) -> NewsMessage:
    return NewsMessage(
        ticket_id,
        frame.epoch,
        frame.first_block_index,
        frame.num_blocks,
        block_bytes,
        frame.first_checksum_index,
        frame.checksums,
        () if frame.first_token_id is None else (frame.first_token_id,),
    )


def _error_message(request: PullMessage, error: TandemError) -> ErrorMessage:
    pairs = [_cut(text) for pair in list(error.metadata.items())[:MAX_METADATA] for text in pair]
    return ErrorMessage(request.ticket_id, request.epoch, error.reason, _cut(error.message), tuple(pairs))


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")

"""The consumer's side of the KV port: what a producer tells of a ticket, and the connections that it comes over."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from kvtransfer.connection import Connection
from kvtransfer.frames import NewsFrame
from kvtransfer.kv_messages import ErrorMessage, FrameError, NewsMessage, PullMessage, ReleaseMessage
from kvtransfer.pull_state import InterruptedPullError, StalledPullError
from kvtransfer.ticket import KvPort, KvTicket
from tandem.errors import Reason, TandemError

STALL_S = 1.5
"""Without a byte for so long the producer counts as lost. It sends a sign of life three times as often."""

MAX_IDLE_CONNECTIONS = 4


class Answer:
    """What comes back for one pull."""

    def __init__(self, connection: Connection, ticket: KvTicket) -> None:
        self._connection = connection
        self._ticket = ticket

    async def frames(self) -> AsyncGenerator[NewsFrame, None]:
        """Without end; whoever has heard everything stops. Raises the error that the producer sent."""
        while True:
            message = await self._connection.receive()
            self._check(message.ticket_id, message.epoch)
            match message:
                case NewsMessage():
                    yield self._frame(message)
                case ErrorMessage():
                    raise _error_of(message)
                case _:
                    raise FrameError("only a producer's messages may come here")

    async def receive_into(self, target: memoryview) -> None:
        """The next bytes of the blocks that the last frame told of."""
        await self._connection.receive_into(target)

    def _check(self, ticket_id: str, epoch: int) -> None:
        if (ticket_id, epoch) != (self._ticket.ticket_id, self._ticket.epoch):
            raise FrameError("a message of another ticket")

    def _frame(self, message: NewsMessage) -> NewsFrame:
        if message.block_bytes != self._ticket.layout.block_bytes:
            raise FrameError(f"blocks of {message.block_bytes} bytes instead of {self._ticket.layout.block_bytes}")
        return NewsFrame(
            message.epoch,
            message.first_block_index,
            message.num_blocks,
            message.first_checksum_index,
            message.checksums,
            message.first_token_id[0] if message.first_token_id else None,
        )


class Connections:
    """To one producer's KV port. A connection serves one pull at a time, and then later ones, until the producer closes it."""

    def __init__(self, port: KvPort) -> None:
        self.port = port
        self._idle: list[Connection] = []
        self._closed = False

    @asynccontextmanager
    async def pulling(self, ticket: KvTicket, first_block_index: int, *, with_blocks: bool) -> AsyncIterator[Answer]:
        """Asks for the ticket's news, or its blocks too. To be left without an error only when all was heard.

        Whatever is amiss with the connection raises InterruptedPullError.
        """
        connection = await self._connect()
        reusable = False
        try:
            await connection.send(PullMessage(ticket.ticket_id, ticket.epoch, first_block_index, int(with_blocks)))
            yield Answer(connection, ticket)
            reusable = True
        except TimeoutError as error:
            raise StalledPullError(f"no byte came for {STALL_S} s") from error
        except (OSError, FrameError) as error:
            raise InterruptedPullError(str(error)) from error
        finally:
            self._put_back(connection, reusable)

    async def release(self, ticket: KvTicket) -> bool:
        """Sends word over a connection that is at rest; False if there is none, or it breaks."""
        connection = self._take_idle()
        if connection is None:
            return False
        sent = False
        try:
            await connection.send(ReleaseMessage(ticket.ticket_id, ticket.epoch))
            sent = True
        except OSError:
            return False
        finally:
            self._put_back(connection, sent)
        return True

    def close(self) -> None:
        """Those of pulls that still run are closed when these end."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> Connection:
        host, port = self.port.host, self.port.port
        try:
            return self._take_idle() or await Connection.open(host, port, STALL_S)
        except TimeoutError as error:
            raise StalledPullError(f"{host}:{port} does not answer") from error
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            raise InterruptedPullError(f"no connection to {host}:{port}: {error}") from error

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            connection.unwatch()
            if connection.quiet:
                return connection
            connection.close()
        return None

    def _put_back(self, connection: Connection, reusable: bool) -> None:
        if reusable and not self._closed and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
            connection.watch(partial(self._forget, connection))
        else:
            connection.close()

    def _forget(self, connection: Connection) -> None:
        """The producer has closed it."""
        self._idle.remove(connection)
        connection.close()


def _error_of(message: ErrorMessage) -> TandemError:
    if message.reason not in Reason.__members__:
        return TandemError(Reason.INTERNAL, message.message)
    pairs = zip(message.metadata[::2], message.metadata[1::2], strict=False)
    return TandemError(Reason(message.reason), message.message, metadata=dict(pairs))

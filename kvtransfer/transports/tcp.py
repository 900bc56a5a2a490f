"""The consumer's side of the tcp transport."""

from collections.abc import Sequence

from kvtransfer.frames import BlocksFrame
from kvtransfer.intake import Pull, Sequencer
from kvtransfer.pull_state import InterruptedPullError, StalledPullError
from kvtransfer.staging import Stage
from kvtransfer.ticket import KvTicket, TcpOffer
from kvtransfer.transports.connection import Connection
from kvtransfer.transports.tcp_frames import BlocksMessage, EndMessage, ErrorMessage, FrameError, Message, PullMessage, WaitMessage
from tandem.errors import Reason, TandemError

STALL_S = 1.5
"""Without a byte for so long the producer counts as lost. It sends a sign of life three times as often."""

MAX_IDLE_CONNECTIONS = 4


class TcpClient:
    """Pulls from one producer. A connection serves one pull at a time, and then later ones."""

    def __init__(self, offer: TcpOffer) -> None:
        self.offer = offer
        self._idle: list[Connection] = []

    async def fetch(self, stage: Stage, pull: Pull) -> int:
        """Receives the blocks, from the first that is not verified on, and has them verified in place; returns the first token.

        Raises InterruptedPullError, DamagedBlockError, or the error that the producer sent.
        """
        ticket = pull.ticket
        connection = await self._connect()
        reusable = False
        try:
            await connection.send(PullMessage(ticket.ticket_id, ticket.epoch, pull.destination.state.num_verified))
            first_token_id = await _receive(connection, stage, pull)
            reusable = True
        except TimeoutError as error:
            raise StalledPullError(f"no byte came for {STALL_S} s") from error
        except (OSError, FrameError) as error:
            raise InterruptedPullError(str(error)) from error
        finally:
            self._put_back(connection, reusable)
        return first_token_id

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> Connection:
        host, port = self.offer.host, self.offer.port
        try:
            return self._take_idle() or await Connection.open(host, port, STALL_S)
        except TimeoutError as error:
            raise StalledPullError(f"{host}:{port} does not answer") from error
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            raise InterruptedPullError(f"no connection to {host}:{port}: {error}") from error

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.quiet:
                return connection
            connection.close()
        return None

    def _put_back(self, connection: Connection, reusable: bool) -> None:
        if reusable and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()


async def _receive(connection: Connection, stage: Stage, pull: Pull) -> int:
    sequencer = pull.sequencer()
    while True:
        message = await connection.receive()
        _check_ticket(message, pull.ticket)
        match message:
            case BlocksMessage():
                pull.destination.state.filling()
                await _receive_blocks(connection, stage, pull, message, sequencer)
            case EndMessage():
                sequencer.end(message.epoch)
                return message.first_token_id
            case ErrorMessage():
                raise _error_of(message)
            case WaitMessage():
                pull.crew.check()


async def _receive_blocks(connection: Connection, stage: Stage, pull: Pull, message: BlocksMessage, sequencer: Sequencer) -> None:
    """Each group of blocks is verified by threads while the next is on its way."""
    first, checksums = message.first_block_index, message.checksums
    num_known = sequencer.accept(BlocksFrame(message.epoch, first, checksums))
    block_bytes = pull.ticket.layout.block_bytes
    if message.block_bytes != block_bytes:
        raise FrameError(f"blocks of {message.block_bytes} bytes instead of {block_bytes}")
    if num_known:
        scratch = memoryview(bytearray(message.block_bytes))
        for _ in range(num_known):
            await connection.receive_into(scratch)
    for start in range(num_known, len(checksums), stage.num_per_room):
        part = checksums[start : start + stage.num_per_room]
        await _receive_run(connection, stage, pull, first + start, part)
        pull.crew.check()


async def _receive_run(connection: Connection, stage: Stage, pull: Pull, first: int, checksums: Sequence[int]) -> None:
    room = await stage.room(pull.destination.block_ids[first : first + len(checksums)])
    try:
        for view in room.views:
            await connection.receive_into(view)
    except BaseException:
        room.release()
        raise
    job = pull.crew.submit(first, checksums, lambda start, end: room.bring(start - first, end - first))
    job.add_done_callback(lambda _: room.release())


def _check_ticket(message: Message, ticket: KvTicket) -> None:
    if (message.ticket_id, message.epoch) != (ticket.ticket_id, ticket.epoch):
        raise FrameError("a frame of another ticket")


def _error_of(message: ErrorMessage) -> TandemError:
    if message.reason not in Reason.__members__:
        return TandemError(Reason.INTERNAL, message.message)
    pairs = zip(message.metadata[::2], message.metadata[1::2], strict=False)
    return TandemError(Reason(message.reason), message.message, metadata=dict(pairs))

"""The producer's side of the heartbeat: a thread that answers beats, whatever the event loop is doing."""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from kvtransfer.heartbeat_frames import HEARTBEAT_FORMAT, BeatMessage, EchoMessage
from kvtransfer.packets import MAX_HEADER_BYTES, PREFIX, FrameError
from kvtransfer.pulse import Pulse

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
IDLE_S = 5.0
"""A connection without a whole beat for so long is closed; consumers beat ten times as often."""
ACCEPT_PAUSE_S = 0.1
_SWEEP_S = 1.0


class _Connection:
    """One consumer's socket and what has come of its next beat."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.received = bytearray()
        self.beat_at = now

    def next_beat(self) -> BeatMessage | None:
        """Takes the next beat from what has been received, if it is whole. Raises FrameError."""
        if len(self.received) < PREFIX.size:
            return None
        end = PREFIX.size + HEARTBEAT_FORMAT.header_bytes(self.received[: PREFIX.size])
        if len(self.received) < end:
            return None
        message = HEARTBEAT_FORMAT.decode(self.received[: PREFIX.size], bytes(self.received[PREFIX.size : end]))
        del self.received[:end]
        if not isinstance(message, BeatMessage) or len(message.ticket_ids) != len(message.epochs):
            raise FrameError("only beats may come here")
        return message


class HeartServer:
    """Owns the listening socket, its connections and the thread. A peer that sends anything but beats is cut off and counted."""

    def __init__(self, pulse: Pulse, producer_id: str, host: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_refused = 0
        self._pulse = pulse
        self._producer_id = producer_id
        self._host = host
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._listener: socket.socket | None = None
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="kv-heartbeat", daemon=True)

    def start(self) -> int:
        """Listens on a free port of the host's first address and returns it. May block. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=128)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Ends the thread, which closes everything. Blocks for a moment. Idempotent."""
        if self._thread.is_alive():
            self._waker.send(b"x")
            self._thread.join()
        self._waker.close()
        self._wakened.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            while self._serve_ready():
                self._sweep()
        finally:
            assert self._listener is not None
            self._listener.close()
            for connection in self._connections:
                connection.sock.close()

    def _serve_ready(self) -> bool:
        """One round; False to end."""
        for key, _ in self._selector.select(_SWEEP_S):
            if key.fileobj is self._wakened:
                return False
            if key.fileobj is self._listener:
                self._accept(self._listener)
            else:
                self._serve(key.data)
        return True

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("cannot accept a heartbeat connection: %s", error)
            time.sleep(ACCEPT_PAUSE_S)  # out of descriptors, mostly; the listener stays ready, so trying at once would spin
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self.num_refused += 1
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, self._clock())
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(PREFIX.size + MAX_HEADER_BYTES)
            if not data:
                self._drop(connection)
                return
            connection.received += data
            while (beat := connection.next_beat()) is not None:
                connection.beat_at = self._clock()
                self._answer(connection, beat)
        except FrameError as error:
            self.num_refused += 1
            logger.info("a connection to the heartbeat port was closed: %s", str(error))
            self._drop(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _answer(self, connection: _Connection, beat: BeatMessage) -> None:
        tickets = enumerate(zip(beat.ticket_ids, beat.epochs, strict=True))
        mine = beat.producer_id == self._producer_id
        over = tuple(place for place, ticket in tickets if not (mine and self._pulse.beat(*ticket)))
        echo = HEARTBEAT_FORMAT.encode(EchoMessage(self._producer_id, beat.number, over))
        if connection.sock.send(echo) != len(echo):
            raise FrameError("the peer does not read what it is answered")

    def _sweep(self) -> None:
        latest = self._clock() - IDLE_S
        for connection in [each for each in self._connections if each.beat_at < latest]:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

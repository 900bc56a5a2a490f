"""The consumer's side of the heartbeat: a thread that tells a producer what is being pulled, and learns whether it lives."""

import encodings.idna  # noqa: F401  (resolving wants it, and may be all that a process without descriptors does)
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvtransfer.heartbeat_frames import HEARTBEAT_FORMAT, MAX_TICKETS_PER_BEAT, BeatMessage, EchoMessage
from kvtransfer.ledger import not_found
from kvtransfer.packets import PREFIX, FrameError
from kvtransfer.pull_state import StalledPullError
from kvtransfer.ticket import HeartbeatPort, KvTicket
from tandem.errors import TandemError

logger = logging.getLogger(__name__)

BEAT_S = 0.5
ANSWER_S = 1.0
"""A producer that takes longer to answer counts as lost, however it went: killed, frozen, cut off in one direction or both.

Counted from the beat, not from the last answer: a consumer that was itself frozen asks again before it judges.
"""

Ended = Callable[[StalledPullError | TandemError], None]
"""Told on the lifeline's thread why a pull is of no use any more: the producer is lost, or the ticket is over."""


@dataclass(eq=False)
class _Follower:
    ticket_id: str
    epoch: int
    ended: Ended
    over: bool = False
    """The last answer said that the ticket is over. The stream should bring a better reason; it has until the next beat."""


class Lifeline:
    """One producer's heartbeat, from `start` until `close` or the producer's loss; of no use after that.

    Its answers carry the producer's id, so a new process at the same address is not taken for the old one.
    """

    def __init__(self, port: HeartbeatPort, producer_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.port = port
        self.gone = False
        """The producer was lost. Written by the thread."""
        self._why = ""
        self._producer_id = producer_id
        self._clock = clock
        self._followers: set[_Follower] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._numbers = itertools.count()
        self._socket: socket.socket | None = None
        self._beat_until = 0.0
        self._thread = threading.Thread(target=self._run, name="kv-lifeline", daemon=True)
        self._starting = threading.Lock()

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        """Takes until the thread runs, milliseconds where many want the interpreter: not for an event loop. Idempotent."""
        with self._starting:
            if not self.started:
                self._thread.start()

    @contextmanager
    def follow(self, ticket: KvTicket, ended: Ended) -> Iterator[None]:
        """Renews the ticket's lease while the context lasts, once the thread is started. `ended` may be called until then, and a
        moment longer."""
        follower = _Follower(ticket.ticket_id, ticket.epoch, ended)
        with self._lock:
            self._followers.add(follower)
            gone = self.gone
        if gone:
            ended(self._loss())
        try:
            yield
        finally:
            with self._lock:
                self._followers.discard(follower)

    def close(self) -> None:
        """Ends the thread, within ANSWER_S if it waits for an answer. Idempotent; does not wait."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._beat_all()
                self._stopped.wait(BEAT_S)
        except (OSError, FrameError, UnicodeError) as error:  # the last for what cannot be a host's name
            self._lose(str(error) or type(error).__name__)
        finally:
            self._hang_up()

    def _beat_all(self) -> None:
        """Raises OSError or FrameError if the producer does not answer in time, or is another."""
        with self._lock:
            followers = list(self._followers)
        for start in range(0, max(1, len(followers)), MAX_TICKETS_PER_BEAT):
            part = followers[start : start + MAX_TICKETS_PER_BEAT]
            for place in self._beat(part):
                follower = part[place]
                if follower.over:
                    follower.ended(not_found(follower.ticket_id, follower.epoch, "over at the producer"))
                follower.over = True

    def _beat(self, followers: list[_Follower]) -> tuple[int, ...]:
        """One beat; returns the places of those whose ticket is over. A connection that has ended meanwhile is replaced once."""
        ids, epochs = tuple(each.ticket_id for each in followers), tuple(each.epoch for each in followers)
        self._beat_until = self._clock() + ANSWER_S
        beat = BeatMessage(self._producer_id, next(self._numbers) & 0xFFFFFFFF, ids, epochs)
        if self._socket is not None:
            try:
                return self._exchange(self._socket, beat)
            except (ConnectionError, FrameError):
                self._hang_up()
        self._socket = socket.create_connection((self.port.host, self.port.port), self._patience_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._exchange(self._socket, beat)

    def _exchange(self, sock: socket.socket, beat: BeatMessage) -> tuple[int, ...]:
        sock.settimeout(self._patience_s)
        sock.sendall(HEARTBEAT_FORMAT.encode(beat))
        prefix = self._receive(sock, PREFIX.size)
        echo = HEARTBEAT_FORMAT.decode(prefix, self._receive(sock, HEARTBEAT_FORMAT.header_bytes(prefix)))
        if not isinstance(echo, EchoMessage) or echo.number != beat.number:
            raise FrameError("the answer is to no beat of ours")
        if echo.producer_id != self._producer_id:
            raise FrameError("another process answers for the producer")
        if any(place >= len(beat.ticket_ids) for place in echo.over):
            raise FrameError("the answer names a ticket that was not asked about")
        return echo.over

    def _receive(self, sock: socket.socket, count: int) -> bytes:
        received = b""
        while len(received) < count:
            sock.settimeout(self._patience_s)
            part = sock.recv(count - len(received))
            if not part:
                raise ConnectionResetError("the producer closed the heartbeat connection")
            received += part
        return received

    @property
    def _patience_s(self) -> float:
        """What is left until the producer counts as lost."""
        return max(0.001, self._beat_until - self._clock())

    def _lose(self, why: str) -> None:
        logger.warning("producer %s is lost: %s", self._producer_id[:8], why)
        with self._lock:
            self.gone, self._why = True, why
            followers = list(self._followers)
        for follower in followers:
            follower.ended(self._loss())

    def _loss(self) -> StalledPullError:
        return StalledPullError(f"the producer is lost: {self._why}")

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

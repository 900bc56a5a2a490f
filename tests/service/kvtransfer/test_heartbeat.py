"""Heartbeats between real threads over loopback: who lives, who is lost, and what junk does to the port."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from kvtransfer import lifeline as lifeline_module
from kvtransfer.checksum import block_checksum
from kvtransfer.heart_server import HeartServer
from kvtransfer.heartbeat_frames import HEARTBEAT_FORMAT, MAX_TICKETS_PER_BEAT, BeatMessage, EchoMessage
from kvtransfer.lifeline import Lifeline
from kvtransfer.packets import MAX_HEADER_BYTES, PREFIX
from kvtransfer.pull_state import StalledPullError
from kvtransfer.pulse import Pulse
from kvtransfer.ticket import HeartbeatPort, KvTicket
from tandem.errors import Reason, TandemError
from tests.service.kvtransfer.harness import LAYOUT

TICKET = KvTicket("t", 1, "producer", "m", "k", LAYOUT, 4, (0,), 5000, (), "nowhere:1")
WAIT_S = 30.0


class Heard:
    """What a follower was told, awaited by the test's thread."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self.error: Exception | None = None

    def __call__(self, error: Exception) -> None:
        self.error = error
        self._told.set()

    def wait(self) -> Exception:
        assert self._told.wait(WAIT_S)
        assert self.error is not None
        return self.error


class CountingPulse(Pulse):
    """Lets the test wait for beats."""

    def __init__(self) -> None:
        super().__init__(time.monotonic)
        self.beats = threading.Semaphore(0)

    def beat(self, ticket_id: str, epoch: int) -> bool:
        self.beats.release()
        return super().beat(ticket_id, epoch)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "BEAT_S", 0.01)


@pytest.fixture
def pulse() -> CountingPulse:
    return CountingPulse()


@pytest.fixture
def server(pulse: CountingPulse) -> Iterator[tuple[HeartServer, HeartbeatPort]]:
    server = HeartServer(pulse, "producer", "127.0.0.1")
    port = HeartbeatPort("127.0.0.1", server.start())
    yield server, port
    server.close()


@contextmanager
def line(port: HeartbeatPort, producer_id: str = "producer") -> Iterator[Lifeline]:
    it = Lifeline(port, producer_id)
    it.start()
    try:
        yield it
    finally:
        it.close()
        it._thread.join(WAIT_S)
        assert not it._thread.is_alive()


def test_beats_renew_while_the_pull_lasts(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    """No event loop runs here: neither side's beats need one."""
    pulse.watch("t", 1)
    with line(server[1]) as alive:
        with alive.follow(TICKET, Heard()):
            for _ in range(5):
                assert pulse.beats.acquire(timeout=WAIT_S)
        first = pulse.heard_at("t")
        assert first is not None and not alive.gone


def test_a_ticket_that_is_over_ends_its_pull_and_no_other(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    """As for a consumer that was frozen until its lease was over; another epoch is as good as over."""
    pulse.watch("t", 1)
    pulse.watch("live", 1)
    told, untouched, stale = Heard(), Heard(), Heard()
    with line(server[1]) as alive, alive.follow(TICKET, told), alive.follow(replace(TICKET, ticket_id="live"), untouched):
        assert pulse.beats.acquire(timeout=WAIT_S)
        pulse.forget("t")
        error = told.wait()
        assert isinstance(error, TandemError) and error.reason is Reason.TICKET_NOT_FOUND
        with alive.follow(replace(TICKET, ticket_id="live", epoch=2), stale):
            assert isinstance(stale.wait(), TandemError)
    assert untouched.error is None


def test_more_tickets_than_a_beat_holds(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    count = 2 * MAX_TICKETS_PER_BEAT + 1
    with line(server[1]) as alive, ExitStack() as following:
        for number in range(count):
            pulse.watch(f"t{number}", 1)
            following.enter_context(alive.follow(replace(TICKET, ticket_id=f"t{number}"), Heard()))
        for _ in range(2 * count):
            assert pulse.beats.acquire(timeout=WAIT_S)
        assert all(pulse.heard_at(f"t{number}") is not None for number in range(count))


def test_a_killed_producer_is_lost_at_the_next_beat(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    pulse.watch("t", 1)
    told, late = Heard(), Heard()
    with line(server[1]) as alive, alive.follow(TICKET, told):
        assert pulse.beats.acquire(timeout=WAIT_S)
        server[0].close()
        assert isinstance(told.wait(), StalledPullError)
        assert alive.gone
        with alive.follow(TICKET, late):
            assert isinstance(late.wait(), StalledPullError)


def test_a_frozen_or_cut_off_producer_is_lost_when_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes the connection and the beat; for a black hole it is all the same."""
    monkeypatch.setattr(lifeline_module, "ANSWER_S", 0.05)
    told, frozen = Heard(), socket.create_server(("127.0.0.1", 0))
    port = HeartbeatPort("127.0.0.1", frozen.getsockname()[1])
    with frozen, line(port) as alive, alive.follow(TICKET, told):
        assert isinstance(told.wait(), StalledPullError)


def test_a_producer_whose_host_cannot_be_one_is_lost() -> None:
    told = Heard()
    with line(HeartbeatPort("a..b", 1)) as alive, alive.follow(TICKET, told):
        assert isinstance(told.wait(), StalledPullError)
    assert alive.gone, "the next pull would follow a thread that has ended"


def test_another_process_at_the_address_is_not_the_producer(
    server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse
) -> None:
    pulse.watch("t", 1)
    told = Heard()
    with line(server[1], "its predecessor") as alive, alive.follow(TICKET, told):
        assert "another process" in str(told.wait())
    assert pulse.heard_at("t") is None


def test_a_broken_connection_is_replaced(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    pulse.watch("t", 1)
    told = Heard()
    with line(server[1]) as alive, alive.follow(TICKET, told):
        assert pulse.beats.acquire(timeout=WAIT_S)
        assert alive._socket is not None
        alive._socket.shutdown(socket.SHUT_RDWR)
        for _ in range(5):
            assert pulse.beats.acquire(timeout=WAIT_S)
    assert told.error is None


def junk() -> list[bytes]:
    """Random bytes, other protocols, bombs, and real beats cut, changed or out of place."""
    rng = random.Random(5)
    beat = HEARTBEAT_FORMAT.encode(BeatMessage("producer", 1, ("t",), (1,)))
    mutated = []
    for _ in range(200):
        frame = bytearray(beat)
        at = rng.randrange(len(frame))
        frame[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        mutated.append(bytes(frame))
    bombs = [b"\xdd\xff\xff\xff\xff", b"\x91" * MAX_HEADER_BYTES, b"\xdc\xff\xff" + b"\x90" * (MAX_HEADER_BYTES - 3)]
    return [
        *(rng.randbytes(rng.randrange(1, 300)) for _ in range(100)),
        *(each for each in mutated if each != beat),
        *(HEARTBEAT_FORMAT.prefix(len(bomb), block_checksum(bomb)) + bomb for bomb in bombs),
        HEARTBEAT_FORMAT.prefix(2**32 - 1, 0),
        HEARTBEAT_FORMAT.encode(EchoMessage("producer", 1, ())),
        HEARTBEAT_FORMAT.encode(BeatMessage("producer", 1, ("t",), ())),
        b"GET / HTTP/1.1\r\n\r\n",
    ]


def test_junk_is_cut_off_and_beats_go_on(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    pulse.watch("t", 1)
    told = Heard()
    with line(server[1]) as alive, alive.follow(TICKET, told):
        for data in junk():
            with socket.create_connection((server[1].host, server[1].port), WAIT_S) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert _rest(sock) == b""
        for _ in range(5):
            assert pulse.beats.acquire(timeout=WAIT_S)
    assert told.error is None and server[0].num_refused > 150
    assert pulse.heard_at("t") is not None


def test_half_a_beat_waits_for_its_other_half(server: tuple[HeartServer, HeartbeatPort], pulse: CountingPulse) -> None:
    pulse.watch("t", 1)
    beat = HEARTBEAT_FORMAT.encode(BeatMessage("producer", 7, ("t",), (1,)))
    with socket.create_connection((server[1].host, server[1].port), WAIT_S) as sock:
        for end in range(len(beat)):
            sock.sendall(beat[end : end + 1])
        sock.sendall(beat)
        for _ in range(2):
            prefix = sock.recv(PREFIX.size, socket.MSG_WAITALL)
            header = sock.recv(HEARTBEAT_FORMAT.header_bytes(prefix), socket.MSG_WAITALL)
            assert HEARTBEAT_FORMAT.decode(prefix, header) == EchoMessage("producer", 7, ())


def _rest(sock: socket.socket) -> bytes:
    received = b""
    try:
        while part := sock.recv(4096):
            received += part
    except ConnectionError:
        pass
    return received

"""One KV connection: messages, and blocks received into the memory where they belong."""

import asyncio
import encodings.idna  # noqa: F401  (resolving wants it, and may be all that a process without descriptors does)
import socket
from collections.abc import Callable, Sequence
from typing import Any

from kvtransfer.kv_messages import PREFIX, Message, decode, encode, header_bytes

_FAIR_BYTES = 1 << 20
"""After so much without a pause, others get a turn on the event loop."""

_AHEAD_BYTES = 4096
"""A message of as many blocks as one may tell of, or all that a peer has sent of several, comes with one system call."""

_PIECE_BYTES = 1 << 19
"""Most that one system call moves: the loop stands still for as long as that takes."""

_NOTHING = memoryview(b"")


class Connection:
    """Owns a connected non-blocking socket. One coroutine sends and one receives at a time.

    Every wait for the peer ends with TimeoutError after `stall_s` without a byte moved. The peer's going away is a ConnectionError.
    Bytes are only ever moved between socket and memory by the coroutine itself: once it is cancelled nothing touches the memory.
    """

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Small frames to a vanished host would go unanswered for minutes without making a send wait.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_s * 1000))
        self._socket = sock
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._turn_bytes = 0
        self._room = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead = bytearray()
        """What has come of the next messages, and perhaps of the blocks behind them."""
        self._unsent = _NOTHING
        self._listening = False
        self._waiting: asyncio.Future[None] | None = None
        """Whoever receives, while nothing has come."""
        self._gone: Callable[[], object] | None = None

    @classmethod
    async def open(cls, host: str, port: int, stall_s: float) -> "Connection":
        """Connects to the first of the host's addresses that answers. Raises OSError (which TimeoutError is)."""
        async with asyncio.timeout(stall_s):
            addresses = await _resolved(host, port)
            for family, kind, protocol, _, address in addresses[:-1]:
                try:
                    return cls(await _connected(family, kind, protocol, address), stall_s)
                except OSError:
                    continue
            family, kind, protocol, _, address = addresses[-1]
            return cls(await _connected(family, kind, protocol, address), stall_s)

    def send_at_once(self, message: Message) -> bool:
        """Whether the socket took all of the message. If not, `flush` comes before anything else is sent."""
        data = encode(message)
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        self._unsent = memoryview(data)[sent:]
        return not self._unsent

    async def send(self, message: Message) -> None:
        """Sends a message; the blocks that belong to it follow."""
        if not self.send_at_once(message):
            await self.flush()

    async def flush(self) -> None:
        """Sends what is left of a message."""
        rest, self._unsent = self._unsent, _NOTHING
        await self.send_blocks([rest], lambda: None)

    async def send_blocks(self, blocks: Sequence[memoryview], check: Callable[[], None]) -> None:
        """Sends bytes as they are. `check` is called before each piece, right before it goes; its error ends the sending."""
        for part in blocks:
            sent = 0
            while sent < len(part):
                sent += await self._send_some(part[sent : sent + _PIECE_BYTES], check)

    async def receive(self, wait_s: float | None = None) -> Message:
        """The next message, which the peer may take `wait_s` to begin, then `stall_s` in all to end. FrameError if it is none."""
        if not self._ahead:
            await self._receive_ahead(wait_s or self._stall_s)
        message, deadline = self._take_message(), self._loop.time() + self._stall_s
        while message is None:
            await self._receive_ahead(deadline - self._loop.time())
            message = self._take_message()
        return message

    async def receive_into(self, target: memoryview) -> None:
        """Fills `target` with the next bytes."""
        received = min(len(target), len(self._ahead))
        target[:received] = self._ahead[:received]
        del self._ahead[:received]
        while received < len(target):
            received += await self._receive_some(target[received : received + _PIECE_BYTES], self._stall_s)

    def watch(self, gone: Callable[[], object]) -> None:
        """Calls `gone` as soon as the peer closes its side, until `unwatch`; nothing may be received meanwhile."""
        self._gone = gone
        self._listen()

    def unwatch(self) -> None:
        self._gone = None

    @property
    def quiet(self) -> bool:
        """Whether the connection is up and holds no unread byte; an idle one that is not quiet is of no use any more."""
        return not self._ahead and self._peek() is None

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def _listen(self) -> None:
        if not self._listening:
            self._listening = True
            self._loop.add_reader(self._socket, self._on_bytes)

    def _on_bytes(self) -> None:
        """Goes on listening while somebody wants to know: beginning and ending it are a system call each, for every message."""
        if self._waiting is not None:
            _resolve(self._waiting)
            return
        more = self._peek()
        if more is None:
            return
        self._listening = False
        self._loop.remove_reader(self._socket)
        gone, self._gone = self._gone, None
        if gone is not None and not more:
            gone()

    def _peek(self) -> bytes | None:
        """The first unread byte; none at the end. None if nothing has come."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _take_message(self) -> Message | None:
        """The message at the beginning of what has come, if it is whole. Raises FrameError."""
        ahead = self._ahead
        if len(ahead) < PREFIX.size:
            return None
        prefix = ahead[: PREFIX.size]
        end = PREFIX.size + header_bytes(prefix)
        if len(ahead) < end:
            return None
        header = bytes(ahead[PREFIX.size : end])
        del ahead[:end]
        return decode(prefix, header)

    async def _receive_ahead(self, wait_s: float) -> None:
        received = await self._receive_some(self._room, wait_s)
        self._ahead += self._room[:received]

    async def _send_some(self, part: memoryview, check: Callable[[], None]) -> int:
        await self._take_turns(len(part))
        while True:
            check()
            try:
                return self._socket.send(part)
            except BlockingIOError:
                await self._writable()

    async def _receive_some(self, target: memoryview, wait_s: float) -> int:
        await self._take_turns(len(target))
        while True:
            try:
                received = self._socket.recv_into(target)
            except BlockingIOError:
                await self._readable(wait_s)
                continue
            if received == 0 and len(target) > 0:
                raise ConnectionResetError("the peer closed the connection")
            return received

    async def _take_turns(self, num_bytes: int) -> None:
        self._turn_bytes += num_bytes
        if self._turn_bytes > _FAIR_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)

    async def _readable(self, wait_s: float) -> None:
        self._waiting = self._loop.create_future()
        self._listen()
        try:
            await self._until(self._waiting, wait_s)
        finally:
            self._waiting = None

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._socket, _resolve, ready)
        try:
            await self._until(ready, self._stall_s)
        finally:
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket)

    async def _until(self, ready: "asyncio.Future[None]", wait_s: float) -> None:
        """A timer of our own costs half of what asyncio.timeout does."""
        self._turn_bytes = 0
        timer = self._loop.call_later(max(0.0, wait_s), _expire, ready)
        try:
            await ready
        finally:
            timer.cancel()


async def _resolved(host: str, port: int) -> Sequence[Any]:
    """What is an address already needs no resolver, and no thread to ask it."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _resolve(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _expire(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_exception(TimeoutError())


async def _connected(family: int, kind: int, protocol: int, address: object) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock

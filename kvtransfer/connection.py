"""One KV connection: messages, and blocks received into the memory where they belong."""

import asyncio
import encodings.idna  # noqa: F401  (resolving wants it, and may be all that a process without descriptors does)
import socket
from collections.abc import Callable, Sequence
from typing import Any

from kvtransfer.kv_messages import PREFIX, Message, decode, encode, header_bytes

_FAIR_BYTES = 1 << 20
"""After so much without a pause, others get a turn on the event loop."""

_PIECE_BYTES = 1 << 19
"""Most that one system call moves: the loop stands still for as long as that takes."""


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

    async def send(self, message: Message) -> None:
        """Sends a message; the blocks that belong to it follow."""
        await self.send_blocks([memoryview(encode(message))], lambda: None)

    async def send_blocks(self, blocks: Sequence[memoryview], check: Callable[[], None]) -> None:
        """Sends bytes as they are. `check` is called before each piece, right before it goes; its error ends the sending."""
        for part in blocks:
            sent = 0
            while sent < len(part):
                sent += await self._send_some(part[sent : sent + _PIECE_BYTES], check)

    async def receive(self, wait_s: float | None = None) -> Message:
        """The next message, which the peer may take `wait_s` to begin, then `stall_s` in all to end. FrameError if it is none."""
        prefix = bytearray(PREFIX.size)
        first = await self._receive_some(memoryview(prefix), wait_s or self._stall_s)
        deadline = self._loop.time() + self._stall_s
        await self._receive_until(deadline, memoryview(prefix)[first:])
        header = bytearray(header_bytes(prefix))
        await self._receive_until(deadline, memoryview(header))
        return decode(prefix, bytes(header))

    async def receive_into(self, target: memoryview) -> None:
        """Fills `target` with the next bytes."""
        received = 0
        while received < len(target):
            received += await self._receive_some(target[received : received + _PIECE_BYTES], self._stall_s)

    def watch(self, gone: Callable[[], object]) -> None:
        """Calls `gone` as soon as the peer closes its side, until `unwatch`; nothing may be received meanwhile."""
        self._loop.add_reader(self._socket, self._peek, gone)

    def unwatch(self) -> None:
        self._loop.remove_reader(self._socket)

    @property
    def quiet(self) -> bool:
        """Whether the connection is up and holds no unread byte; an idle one that is not quiet is of no use any more."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def _peek(self, gone: Callable[[], object]) -> None:
        try:
            more = self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        self.unwatch()
        if not more:
            gone()

    async def _send_some(self, part: memoryview, check: Callable[[], None]) -> int:
        await self._take_turns(len(part))
        while True:
            check()
            try:
                return self._socket.send(part)
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer, self._stall_s)

    async def _receive_some(self, target: memoryview, wait_s: float) -> int:
        await self._take_turns(len(target))
        while True:
            try:
                received = self._socket.recv_into(target)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader, wait_s)
                continue
            if received == 0 and len(target) > 0:
                raise ConnectionResetError("the peer closed the connection")
            return received

    async def _receive_until(self, deadline: float, target: memoryview) -> None:
        """Fills `target`; the clock is only looked at where there is something to wait for."""
        received = 0
        while received < len(target):
            received += await self._receive_some(target[received:], deadline - self._loop.time())

    async def _take_turns(self, num_bytes: int) -> None:
        self._turn_bytes += num_bytes
        if self._turn_bytes > _FAIR_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)

    async def _ready(self, add: Callable[..., object], remove: Callable[..., object], wait_s: float) -> None:
        """Waits until the socket can be read or written. A timer of our own costs half of what asyncio.timeout does."""
        self._turn_bytes = 0
        ready = self._loop.create_future()
        add(self._socket, _resolve, ready)
        timer = self._loop.call_later(max(0.0, wait_s), _expire, ready)
        try:
            await ready
        finally:
            timer.cancel()
            if self._socket.fileno() >= 0:
                remove(self._socket)


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

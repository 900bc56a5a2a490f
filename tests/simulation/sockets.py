"""TCP sockets between simulated processes, with the names of the class `socket.socket`.

A stream of bytes in order. Kernels accept connections and bytes on behalf of frozen processes; buffers are so small that sends are
often partial. A closed or dead peer shows as an end of the stream, a broken way not at all.
"""

import asyncio
import itertools
import socket as real_socket
from collections.abc import Callable
from typing import Any

from tests.simulation import threads
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network, Pipe
from tests.simulation.process import Process
from tests.simulation.waited import Waited

BUFFER_BYTES = 512
FIRST_PORT = 40_000
_PEEK = int(real_socket.MSG_PEEK)


class SocketLayer:
    """The sockets of one simulation. `mangle` may change bytes that are sent; it is given the port that they are for."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.ports = itertools.count(FIRST_PORT)
        self.descriptors = itertools.count(1_000)
        self.mangle: Callable[[int, bytes], bytes] = lambda port, data: data

    @property
    def loop(self) -> SimulatedLoop:
        return self.network.loop


def layer() -> SocketLayer:
    """That of the running simulation."""
    return threads.loop().sockets  # type: ignore[no-any-return]


class Socket(Waited):
    """socket.socket."""

    def __init__(self, family: int = 2, type: int = 1, proto: int = 0, fileno: int | None = None) -> None:
        self._layer = layer()
        super().__init__(self._layer.loop.current)
        self._descriptor = next(self._layer.descriptors)
        self._name: tuple[str, int] = ("", 0)
        self._peer: Socket | None = None
        self._out: Pipe | None = None
        self._port = 0
        self._received = bytearray()
        self._unread_there = self._unacknowledged = 0
        self._ended = False
        self._connected = False
        self._backlog: list[Socket] | None = None
        self._rpc_server: Any = None
        self._layer.network.links.append(self)

    # Of the listening side.

    def bind(self, address: tuple[str, int]) -> None:
        port = address[1] or next(self._layer.ports)
        self._name = (address[0], port)

    def listen(self, backlog: int = 128) -> None:
        key = f"{self._name[0]}:{self._name[1]}"
        if key in self._layer.network.listeners:
            raise OSError(98, "Address already in use")
        self._layer.network.listeners[key] = self
        self._backlog = []

    def accept(self) -> "tuple[Socket, tuple[str, int]]":
        self._check_open()
        assert self._backlog is not None
        self._wait_for(lambda: bool(self._backlog))
        sock = self._backlog.pop(0)
        return sock, ("peer", 0)

    def getsockname(self) -> tuple[str, int]:
        return self._name

    # Connecting.

    def connect(self, address: tuple[str, int]) -> None:
        outcome: list[OSError | None] = []
        self._begin_connect(address, outcome.append)
        self._wait_for(lambda: bool(outcome))
        if outcome[0] is not None:
            raise outcome[0]

    async def connect_soon(self, address: tuple[str, int]) -> None:
        done = self._layer.loop.create_future()
        self._begin_connect(address, lambda error: done.done() or done.set_result(error))
        error = await done
        if error is not None:
            raise error

    def _begin_connect(self, address: tuple[str, int], tell: Callable[[OSError | None], Any]) -> None:
        """The other kernel answers, even for a frozen process; nobody does through a cut."""
        network = self._layer.network
        listener = network.listeners.get(f"{address[0]}:{address[1]}")

        def finish(error: OSError | None) -> None:
            if error is None:
                self._connected = True
            tell(error)
            self._changed()

        if listener is None:
            self._layer.loop.call_later(network.delay(), finish, ConnectionRefusedError(111, "Connection refused"))
            return
        if not network.reachable_both_ways(self.process, listener.process):
            return
        if not isinstance(listener, Socket):  # a server of rpc.py, to which no bytes can be sent
            self._rpc_server = listener
            self._layer.loop.call_later(network.delay(), finish, None)
            return
        there = listener._accept_from(self, address[1])
        self._layer.loop.call_later(network.delay(), finish, None if there else ConnectionRefusedError(111, "refused"))

    def _accept_from(self, client: "Socket", port: int) -> "Socket | None":
        if self._backlog is None:
            return None
        before, self._layer.loop.current = self._layer.loop.current, self.process
        try:
            there = Socket()
        finally:
            self._layer.loop.current = before
        there._connected = True
        join(client, there, port)
        self._backlog.append(there)
        self._changed()
        return there

    async def first_word(self) -> bytes:
        """Of a server of rpc.py, which speaks first if it lives and is not frozen."""
        process = self._rpc_server.process
        await asyncio.sleep(2 * self._layer.network.delay())
        while process.frozen or not self._layer.network.reachable_both_ways(self.process, process):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return b"!" if process.alive else b""

    # Bytes.

    def send(self, data: Any, flags: int = 0) -> int:
        self._check_open()
        if self._ended or self._peer is None or self._out is None:
            raise BrokenPipeError(32, "Broken pipe")
        self._wait_for(lambda: self._unread_there < BUFFER_BYTES or self._ended)
        if self._ended:
            raise ConnectionResetError(104, "Connection reset by peer")
        part = bytes(data[: BUFFER_BYTES - self._unread_there])
        self._unread_there += len(part)
        self._out.send(self._peer._arrive, self._layer.mangle(self._port, part))
        return len(part)

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data)
        while view:
            view = view[self.send(view) :]

    def recv(self, count: int, flags: int = 0) -> bytes:
        self._check_open()
        self._wait_for(lambda: bool(self._received) or self._ended)
        data = bytes(self._received[:count])
        if not flags & _PEEK:
            self._take(len(data))
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        data = self.recv(nbytes or len(buffer), flags)
        buffer[: len(data)] = data
        return len(data)

    def _take(self, count: int) -> None:
        """The sender hears of it once there is half a buffer of new room."""
        del self._received[:count]
        self._unacknowledged += count
        if self._unacknowledged >= BUFFER_BYTES // 2 and self._peer is not None and self._out is not None:
            self._out.send(self._peer._acknowledged, self._unacknowledged)
            self._unacknowledged = 0

    def _arrive(self, data: bytes) -> None:
        if self._descriptor >= 0 and not self._ended:
            self._received += data
            self._changed()

    def _acknowledged(self, count: int) -> None:
        self._unread_there -= count
        self._changed()

    def _end(self) -> None:
        """The peer is gone."""
        self._ended = True
        self._changed()

    # Life.

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor < 0:
            return
        self._descriptor = -1
        self._leave()
        if self._peer is not None and self._out is not None:
            self._out.send(self._peer._end)

    def shutdown(self, how: int) -> None:
        self.close()

    def died(self, process: Process) -> None:
        """Of a network link."""
        if process is not self.process:
            return
        self._descriptor = -1
        self._leave()
        network, peer = self._layer.network, self._peer
        if peer is not None and not network.is_cut(process, peer.process):
            self._layer.loop.deliver(peer.process, self._layer.loop.time() + network.delay(), peer._end)

    def look(self) -> None:
        """Of a network link: kernels do not mind a cut for minutes."""

    def _leave(self) -> None:
        self._reader = self._writer = None
        network = self._layer.network
        if self in network.links:
            network.links.remove(self)
        for address in [address for address, listener in network.listeners.items() if listener is self]:
            del network.listeners[address]
        for waiting in self._backlog or ():
            waiting.close()
        self._backlog = None

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise OSError(9, "Bad file descriptor")

    def __enter__(self) -> "Socket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def readable(self) -> bool:
        return bool(self._received) or self._ended or bool(self._backlog)

    def writable(self) -> bool:
        return self._connected and (self._unread_there < BUFFER_BYTES or self._ended)

    # Options.

    def setsockopt(self, *_: Any) -> None:
        pass

    def setblocking(self, blocking: bool) -> None:
        self._timeout = None if blocking else 0.0

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout


def join(client: Socket, server: Socket, port: int) -> None:
    """Connects two sockets."""
    network = client._layer.network
    client._peer, server._peer = server, client
    client._out = Pipe(network, client.process, server.process)
    server._out = Pipe(network, server.process, client.process)
    client._port = server._port = port
    client._connected = server._connected = True

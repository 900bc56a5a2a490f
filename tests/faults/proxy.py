"""TCP proxies that do harm: cut, stall, repeat or change what passes on a KV connection, or let whole links go dead one way.

`Proxy` stands before a KV port, and each of its connections gets a harm, by byte or by frame. `Link` stands before any port, gRPC's
too, and knows nothing of what passes.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

Harm = Callable[[int, bytes], bytes]
"""From the number of bytes that went before on this connection, and the next ones, to those to pass on; fewer: cut."""


@dataclass
class Proxy:
    """Connections get the harms in turn; those after the last go through untouched."""

    target_port: int
    harms: list[Harm]
    port: int = 0
    num_connections: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either side ends, or the harm cuts."""
        harm = self.harms[self.num_connections] if self.num_connections < len(self.harms) else pass_on
        self.num_connections += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        ways = [
            asyncio.create_task(relay(reader, upstream_writer, pass_on)),
            asyncio.create_task(relay(upstream_reader, writer, harm)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for each in (writer, upstream_writer):
                each.close()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.create_task(self.serve(reader, writer)))


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, harm: Harm) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            changed = harm(passed, data)
            passed += len(data)
            writer.write(changed)
            await writer.drain()
            if len(changed) < len(data):
                return


@dataclass
class Link:
    """Passes bytes on between whoever connects and one target, or holds them, each way on its own, or resets all connections."""

    host: str
    target_port: int
    port: int = 0
    _ways: dict[str, asyncio.Event] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _sockets: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        for way in ("forth", "back"):
            self._ways[way] = asyncio.Event()
            self._ways[way].set()
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hold(self, way: str) -> None:
        """Nothing more passes "forth" (to the target) or "back"; nobody is told."""
        self._ways[way].clear()

    def let(self, way: str) -> None:
        self._ways[way].set()

    def reset(self) -> None:
        """Every connection ends as if its peer had crashed: with RST."""
        for writer in self._sockets:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A target that nobody listens on ends the connection: what a client of the target itself would see."""
        writers = [writer]
        try:
            there_reader, there_writer = await asyncio.open_connection(self.host, self.target_port)
            writers.append(there_writer)
            self._sockets |= set(writers)
            ways = [self._carry("forth", reader, there_writer), self._carry("back", there_reader, writer)]
            tasks = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            return
        finally:
            self._sockets -= set(writers)
            for each in writers:
                each.close()

    async def _carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._ways[way].wait()
                writer.write(data)
                await writer.drain()


def pass_on(passed: int, data: bytes) -> bytes:
    return data


def cut_after(num_bytes: int) -> Harm:
    """Passes exactly so many bytes, then closes."""

    def harm(passed: int, data: bytes) -> bytes:
        return data[: max(0, num_bytes - passed)]

    return harm


def flip_at(position: int, mask: int) -> Harm:
    """Changes one byte on its way."""

    def harm(passed: int, data: bytes) -> bytes:
        if passed <= position < passed + len(data):
            changed = bytearray(data)
            changed[position - passed] ^= mask
            return bytes(changed)
        return data

    return harm


@contextlib.asynccontextmanager
async def proxy(target_port: int, *harms: Harm) -> AsyncIterator[Proxy]:
    it = Proxy(target_port, list(harms))
    server = await asyncio.start_server(it.accept, "127.0.0.1", 0)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()
        for task in it.tasks:
            task.cancel()
        await asyncio.gather(*it.tasks, return_exceptions=True)

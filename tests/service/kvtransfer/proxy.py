"""A TCP proxy that does harm: cuts, stalls or changes what the producer sends."""

import asyncio
import contextlib
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

"""An in-process server of the real chassis around servicers that the tests make."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from tandem.channels import open_channel
from tandem.server import Server, ServerSettings

Addition = tuple[Callable[..., None], object, str]
Start = Callable[..., Awaitable[tuple[Server, grpc.aio.Channel]]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a server named "toy" with the given (add_function, servicer, service_name)s; all end with the test."""
    opened: list[tuple[Server, grpc.aio.Channel]] = []

    async def start_one(*additions: Addition, **settings: Any) -> tuple[Server, grpc.aio.Channel]:
        server = Server("toy", ServerSettings(**settings))
        for addition in additions:
            server.add(*addition)
        port = await server.start()
        opened.append((server, open_channel(f"127.0.0.1:{port}")))
        return opened[-1]

    yield start_one
    for server, channel in opened:
        await channel.close()
        await server._stop_server(0.0)

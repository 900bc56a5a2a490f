"""grpc.aio without sockets: channels and servers that carry the very messages between simulated processes.

Kept: order within a connection, deadlines on both sides, cancellation that may surface inside a write, fail-fast calls with a
reconnect back-off, keepalive pings with the channel's and server's own options, GOAWAY at a graceful stop, statuses with details in
trailers. Left out: bytes. A message is passed by reference, so nobody may change one that was sent.
"""

from collections.abc import Sequence
from typing import Any

from tests.simulation.network import Network
from tests.simulation.rpc.channel import Channel
from tests.simulation.rpc.server import Server
from tests.simulation.rpc.server_call import ServerCall

RELEASE = "/tandem.worker.v1.KvTransferService/Release"
"""A ticket's release, by call or by a word over a KV connection."""


class Rpc:
    """Stands for grpc.aio.server and grpc.aio.insecure_channel in one simulation."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.windows: dict[str, int] = {}
        """Messages that may be on the way to the client process of that name; without an entry, any number."""
        self.open_calls: list[ServerCall] = []
        self.lost_paths: set[str] = set()
        """Methods whose requests never arrive."""

    def server(self, *_: Any, interceptors: Sequence[Any] = (), options: Any = (), **__: Any) -> "Server":
        return Server(self, self.network.loop.current, tuple(interceptors), dict(options or ()))

    def insecure_channel(self, target: str, options: Any = None, **_: Any) -> "Channel":
        return Channel(self, self.network.loop.current, target, dict(options or ()))

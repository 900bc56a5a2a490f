"""One connection between a channel and a server."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.network import Pipe
from tests.simulation.process import Process
from tests.simulation.rpc.server_call import ServerCall
from tests.simulation.rpc.status import Arrival, Code, Trailers

if TYPE_CHECKING:
    from tests.simulation.rpc.channel import Channel
    from tests.simulation.rpc.client_call import ClientCall
    from tests.simulation.rpc.server import Server


class Connection:
    """Between a channel and a server. Each end fails by itself when it learns of the other's end, or hears nothing for too long."""

    def __init__(self, channel: "Channel", server: "Server") -> None:
        self.network = channel.rpc.network
        self.channel = channel
        self.server = server
        self.up = Pipe(self.network, channel.process, server.process)
        self.down = Pipe(self.network, server.process, channel.process)
        self.client_calls: dict[int, ClientCall] = {}
        self.server_calls: dict[int, ServerCall] = {}
        self._client_up = self._server_up = True
        self._impaired_since: float | None = None
        server.connections.append(self)
        self.network.links.append(self)
        self.look()

    def open(self, call: "ClientCall") -> None:
        self.client_calls[call.number] = call
        call.connection = self
        if call.path in self.channel.rpc.lost_paths:
            return
        self.up.send(self._arrive, call.number, call.path, call.request, call.deadline, call.metadata)

    def _arrive(self, number: int, path: str, request: Any, deadline: float | None, metadata: Trailers) -> None:
        if self._server_up:
            self.server_calls[number] = ServerCall(self, Arrival(number, path, request, deadline, metadata))

    def cancel(self, number: int) -> None:
        """From the client."""
        self.client_calls.pop(number, None)
        if self._client_up:
            self.up.send(self._cancelled, number)

    def _cancelled(self, number: int) -> None:
        call = self.server_calls.get(number)
        if call is not None:
            call.client_gone()

    def to_client(self, number: int, what: str, *arguments: Any) -> None:
        """From the server."""
        if self._server_up:
            self.down.send(self._at_client, number, what, arguments)

    def _at_client(self, number: int, what: str, arguments: Any) -> None:
        call = self.client_calls.get(number)
        if call is not None and self._client_up:
            getattr(call, what)(*arguments)

    def taken(self, number: int) -> None:
        """The client has taken a message of a call with a window."""
        if self._client_up:
            self.up.send(self._more_room, number)

    def _more_room(self, number: int) -> None:
        call = self.server_calls.get(number)
        if call is not None:
            call.more_room()

    def go_away(self) -> None:
        """From the server: present calls may end, new ones need another connection."""
        self.down.send(self._gone_away)

    def _gone_away(self) -> None:
        if self.channel.connection is self:
            self.channel.connection = None

    def close(self, why: str) -> None:
        """By either end, in an orderly way."""
        self._client_end(why)
        self._server_end()

    # When the way, or the other end, is no more.

    def died(self, process: Process) -> None:
        if process is self.server.process:
            self._server_up = False
            self._reset_client()
        elif process is self.channel.process:
            self._client_up = False
            self._reset_server()

    def _reset_client(self) -> None:
        """The dead server's kernel says so, if its words get through; else the client's keepalive will."""
        if self.network.is_cut(self.server.process, self.channel.process):
            self.look()
        else:
            when = self.network.loop.time() + self.network.delay()
            self.network.loop.deliver(self.channel.process, when, self._client_end, "Socket closed")

    def _reset_server(self) -> None:
        if self.network.is_cut(self.channel.process, self.server.process):
            self.look()
        else:
            self.network.loop.deliver(self.server.process, self.network.loop.time() + self.network.delay(), self._server_end)

    @property
    def _impaired(self) -> bool:
        client, server = self.channel.process, self.server.process
        if client.frozen or server.frozen or not client.alive or not server.alive:
            return True
        return not self.network.reachable_both_ways(client, server)

    def look(self) -> None:
        """Begins to count, at both ends, while no ping would come back."""
        if not self._impaired:
            self._impaired_since = None
        elif self._impaired_since is None:
            now = self._impaired_since = self.network.loop.time()
            for process, options, action in (
                (self.channel.process, self.channel.options, self._client_end),
                (self.server.process, self.server.options, self._server_end),
            ):
                detection_s = self._detection_s(options)
                if detection_s is not None:
                    self.network.loop.deliver(process, now + detection_s, self._check, now, action)

    def _detection_s(self, options: dict[str, Any]) -> float | None:
        """Keepalive alone does not notice a hung peer; see docs of gRPC's ping timeout."""
        if not options.get("grpc.keepalive_time_ms") or not options.get("grpc.http2.ping_timeout_ms"):
            return None
        keepalive_s = options["grpc.keepalive_time_ms"] / 1000 * self.network.loop.random.random()
        return float(keepalive_s + options["grpc.http2.ping_timeout_ms"] / 1000)

    def _check(self, since: float, action: Callable[..., None]) -> None:
        if self._impaired_since == since and self._impaired:
            action("ping timeout")

    def _client_end(self, why: str) -> None:
        if not self._client_up:
            return
        self._client_up = False
        if self.channel.connection is self:
            self.channel.connection = None
        for call in list(self.client_calls.values()):
            call.end(Code.UNAVAILABLE, why)
        self.client_calls.clear()
        self._forget()
        if self._server_up:
            self.up.send(self._server_end)

    def _server_end(self, why: str = "") -> None:
        if not self._server_up:
            return
        self._server_up = False
        for call in list(self.server_calls.values()):
            call.client_gone()
        if self in self.server.connections:
            self.server.connections.remove(self)
        self._forget()
        if self._client_up:
            self.down.send(self._client_end, "Socket closed")

    def _forget(self) -> None:
        if not self._client_up and not self._server_up and self in self.network.links:
            self.network.links.remove(self)

"""grpc.aio without sockets: channels and servers that carry the very messages between simulated processes.

Kept: order within a connection, deadlines on both sides, cancellation that may surface inside a write, fail-fast calls with a
reconnect back-off, keepalive pings with the channel's and server's own options, GOAWAY at a graceful stop, statuses with details in
trailers. Left out: bytes. A message is passed by reference, so nobody may change one that was sent.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio

from tests.simulation.loop import SimulatedLoop, Violation
from tests.simulation.process import Process
from tests.simulation.network import Network, Pipe

Code = grpc.StatusCode
Trailers = Sequence[tuple[str, Any]]

CONNECT_TIMEOUT_S = 2.0
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 2.0


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


class Server:
    """grpc.aio.Server."""

    def __init__(self, rpc: Rpc, process: Process, interceptors: Sequence[Any], options: dict[str, Any]) -> None:
        self.rpc = rpc
        self.process = process
        self.options = options
        self.interceptors = interceptors
        self.connections: list[Connection] = []
        self.calls: set[ServerCall] = set()
        self._handlers: dict[str, Any] = {}
        self._address = ""
        self._ended = rpc.network.loop.create_future()
        self._quiet = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered ones are the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = _without_bytes(handler)

    def add_insecure_port(self, address: str) -> int:
        if address in self.rpc.network.listeners:
            raise RuntimeError(f"{address} is taken")
        self._address = address
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self.rpc.network.listeners[self._address] = self

    async def stop(self, grace: float | None) -> None:
        self.rpc.network.listeners.pop(self._address, None)
        for connection in list(self.connections):
            connection.go_away()
        if grace:
            try:
                async with asyncio.timeout(grace):
                    while self.calls:
                        self._quiet.clear()
                        await self._quiet.wait()
            except TimeoutError:
                pass
        for call in sorted(self.calls, key=lambda call: call.number):
            call.abort(Code.UNAVAILABLE, "Cancelling all calls")
        while self.calls:
            self._quiet.clear()
            await self._quiet.wait()
        for connection in list(self.connections):
            connection.close("the server has stopped")
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        await self._ended
        return True

    def handler(self, path: str) -> Any:
        return self._handlers.get(path)

    def ended(self, call: "ServerCall") -> None:
        self.calls.discard(call)
        if not self.calls:
            self._quiet.set()


def _without_bytes(handler: Any) -> Any:
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(handler.unary_stream)
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(handler.unary_unary)
    return handler


class Channel:
    """grpc.aio.Channel: at most one connection at a time, made when the first call needs it."""

    def __init__(self, rpc: Rpc, process: Process, address: str, options: dict[str, Any]) -> None:
        self.rpc = rpc
        self.process = process
        self.address = address
        self.options = options
        self.connection: Connection | None = None
        self._connecting = False
        self._waiting: list[ClientCall] = []
        self._calls: set[ClientCall] = set()
        self._retry_at = 0.0
        self._back_off_s = FIRST_BACK_OFF_S
        self._attempt = 0
        self._closed = False

    @property
    def loop(self) -> SimulatedLoop:
        return self.rpc.network.loop

    def unary_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., "ClientCall"]:
        return lambda request, timeout=None, metadata=None, **___: ClientCall(self, path, request, timeout, metadata)

    unary_unary = unary_stream

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., "ClientCall"]:
        raise Violation("streams of requests are not simulated")

    stream_unary = stream_stream

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        for call in sorted(self._calls, key=lambda call: call.number):
            call.cancel()
        if self.connection is not None:
            self.connection.close("the client has closed its channel")

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def begin(self, call: "ClientCall") -> None:
        if self._closed:
            raise grpc.aio.UsageError("Channel is closed.")
        self._calls.add(call)
        if self.connection is not None:
            self.connection.open(call)
        elif self.loop.time() < self._retry_at:
            self.loop.call_soon(call.end, Code.UNAVAILABLE, "the last attempt to connect failed")
        else:
            self._waiting.append(call)
            self._connect()

    def forget(self, call: "ClientCall") -> None:
        self._calls.discard(call)
        if call in self._waiting:
            self._waiting.remove(call)

    def _connect(self) -> None:
        if self._connecting:
            return
        self._connecting = True
        self._attempt += 1
        attempt, listener = self._attempt, self.rpc.network.listeners.get(self.address)
        self.loop.call_later(CONNECT_TIMEOUT_S, self._failed, attempt, "timed out")
        if listener is None:
            self.loop.call_later(self.rpc.network.delay(), self._failed, attempt, "Connection refused")
            return
        out = Pipe(self.rpc.network, self.process, listener.process)
        back = Pipe(self.rpc.network, listener.process, self.process)
        out.send(self._accepted, attempt, listener, back)

    def _accepted(self, attempt: int, listener: Server, back: Pipe) -> None:
        """In the server's process."""
        if self.rpc.network.listeners.get(self.address) is listener:
            back.send(self._connected, attempt, listener)
        else:
            back.send(self._failed, attempt, "Connection reset")

    def _connected(self, attempt: int, listener: Server) -> None:
        if attempt != self._attempt or not self._connecting or self._closed:
            return
        if not listener.process.alive:
            self._failed(attempt, "Connection reset")
            return
        self._connecting = False
        self._back_off_s = FIRST_BACK_OFF_S
        self.connection = Connection(self, listener)
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self.connection.open(call)

    def _failed(self, attempt: int, why: str) -> None:
        if attempt != self._attempt or not self._connecting:
            return
        self._connecting = False
        self._retry_at = self.loop.time() + self._back_off_s * self.loop.random.uniform(0.8, 1.2)
        self._back_off_s = min(self._back_off_s * 1.6, LONGEST_BACK_OFF_S)
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.end(Code.UNAVAILABLE, f"failed to connect to {self.address}: {why}")


class Connection:
    """Between a channel and a server. Each end fails by itself when it learns of the other's end, or hears nothing for too long."""

    def __init__(self, channel: Channel, server: Server) -> None:
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


class ClientCall:
    """grpc.aio.UnaryStreamCall and UnaryUnaryCall."""

    def __init__(self, channel: Channel, path: str, request: Any, timeout: float | None, metadata: Trailers | None) -> None:
        loop = channel.loop
        self.number = next(loop.numbers)
        self.path = path
        self.request = request
        self.metadata: Trailers = tuple(metadata or ())
        self.deadline = None if timeout is None else loop.time() + timeout
        self.connection: Connection | None = None
        self._channel = channel
        self._received: deque[Any] = deque()
        self._news = asyncio.Event()
        self._initial = asyncio.Event()
        self._status: tuple[Code, str, Trailers] | None = None
        self._cancelled_here = False
        self._ended = asyncio.Event()
        self._callbacks: list[Callable[[Any], None]] = []
        self._timer = None if timeout is None else loop.call_later(max(timeout, 0.0), self._expire)
        channel.begin(self)

    def __hash__(self) -> int:
        return self.number

    # The server's words.

    def on_initial(self) -> None:
        self._initial.set()

    def on_message(self, message: Any) -> None:
        self.on_initial()
        self._received.append(message)
        self._news.set()

    def end(self, code: Code, details: str, trailers: Trailers = ()) -> None:
        if self._status is not None:
            return
        self._status = (code, details, trailers)
        if self._timer is not None:
            self._timer.cancel()
        if self.connection is not None:
            self.connection.client_calls.pop(self.number, None)
        self._channel.forget(self)
        self.on_initial()
        self._ended.set()
        self._news.set()
        for callback in self._callbacks:
            self._channel.loop.call_soon(callback, self)

    # The caller's.

    def done(self) -> bool:
        return self._status is not None

    def cancelled(self) -> bool:
        return self._status is not None and self._status[0] is Code.CANCELLED

    def cancel(self) -> bool:
        if self.done():
            return False
        self._cancelled_here = True
        self._reset()
        self.end(Code.CANCELLED, "Locally cancelled by application!")
        return True

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self.done():
            callback(self)
        else:
            self._callbacks.append(callback)

    def time_remaining(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - self._channel.loop.time(), 0.0)

    async def code(self) -> Code:
        await self._ended.wait()
        assert self._status is not None
        return self._status[0]

    async def details(self) -> str:
        await self._ended.wait()
        assert self._status is not None
        return self._status[1]

    async def trailing_metadata(self) -> Trailers:
        await self._ended.wait()
        assert self._status is not None
        return self._status[2]

    async def initial_metadata(self) -> Trailers:
        await self._initial.wait()
        return ()

    async def read(self) -> Any:
        """As gRPC's own: cancelling whoever reads cancels the call."""
        while not self._received:
            if self._status is not None:
                self._raise_for_status()
                return grpc.aio.EOF
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        message = self._received.popleft()
        if self.connection is not None and self._channel.process.name in self._channel.rpc.windows:
            self.connection.taken(self.number)
        return message

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def _response(self) -> Any:
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._raise_for_status()
        return self._received[0]

    def _raise_for_status(self) -> None:
        assert self._status is not None
        code, details, trailers = self._status
        if self._cancelled_here:
            raise asyncio.CancelledError
        if code is not Code.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details)

    def _expire(self) -> None:
        if not self.done():
            self._reset()
            self.end(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _reset(self) -> None:
        if self.connection is not None:
            self.connection.cancel(self.number)


@dataclass(frozen=True)
class Arrival:
    """A call as it comes to the server."""

    number: int
    path: str
    request: Any
    deadline: float | None
    metadata: Trailers


class ServerCall:
    """One call at the server: runs the handler in a task, and is its ServicerContext."""

    def __init__(self, connection: Connection, arrival: Arrival) -> None:
        deadline = arrival.deadline
        self.number = arrival.number
        self.path = arrival.path
        self.connection = connection
        self._server = connection.server
        self._loop = connection.network.loop
        self._request = arrival.request
        self._deadline = deadline
        self._metadata = arrival.metadata
        self._status: tuple[Any, str, Trailers] = (None, "", ())
        self._gone = False
        self._writing = False
        self._initial_sent = False
        self._num_unread = 0
        self._room: asyncio.Event | None = None
        self._window = self._server.rpc.windows.get(connection.channel.process.name)
        self._server.calls.add(self)
        self._server.rpc.open_calls.append(self)
        self._timer = None if deadline is None else self._loop.call_at(deadline, self.client_gone)
        self.task_process = self._loop.current
        self._open = True
        self._task = self._loop.create_task(self._run())
        # A task that is cancelled before its first step does not even begin.
        self._task.add_done_callback(lambda _: self._end(Code.CANCELLED, ""))

    def __hash__(self) -> int:
        return self.number

    async def _run(self) -> None:
        try:
            await self._answer()
            code, details, trailers = self._status
            self._end(code or Code.OK, details, trailers)
        except grpc.aio.AbortError:
            self._end(*self._status)
        except asyncio.CancelledError:
            self._end(Code.CANCELLED, "")
        except grpc.aio.InternalError:
            self._end(Code.CANCELLED, "")
        except Exception as error:
            self._loop.violations.append(f"I9: {self._server.process}: {self.path} ended with {error!r}")
            self._end(Code.UNKNOWN, repr(error))

    async def _answer(self) -> None:
        handler = self._server.handler(self.path)
        if handler is None:
            self._status = (Code.UNIMPLEMENTED, "Method not found!", ())
            return
        details = SimpleNamespace(method=self.path, invocation_metadata=self._metadata)
        for interceptor in self._server.interceptors:
            plain = handler
            handler = await interceptor.intercept_service(_continuation(plain), details)
        if handler.unary_unary:
            response = await handler.unary_unary(self._request, self)
            self._send("on_message", response)
        else:
            await handler.unary_stream(self._request, self)

    def _end(self, code: Code, details: str, trailers: Trailers = ()) -> None:
        if not self._open:
            return
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        self._send("end", code, details, trailers)
        self.connection.server_calls.pop(self.number, None)
        self._server.ended(self)
        self._server.rpc.open_calls.remove(self)

    def _send(self, what: str, *arguments: Any) -> None:
        if not self._gone:
            self.connection.to_client(self.number, what, *arguments)

    # Ends from outside.

    def client_gone(self) -> None:
        """Cancelled, expired, or cut off. A write under way may say so before the task is cancelled."""
        if self._gone:
            return
        self._gone = True
        if self._room is not None:
            self._room.set()
        if self._writing and self._loop.random.random() < 0.5:
            self._loop.call_later(self._loop.random.uniform(0.0, 0.001), self._task.cancel)
        else:
            self._writing = False
            self._task.cancel()

    def abort(self, code: Code, details: str) -> None:
        """By the server itself."""
        self._send("end", code, details, ())
        self._gone = True
        if self._room is not None:
            self._room.set()
        self._task.cancel()

    def more_room(self) -> None:
        self._num_unread -= 1
        if self._room is not None:
            self._room.set()

    # ServicerContext.

    async def write(self, message: Any) -> None:
        self._writing = True
        await asyncio.sleep(0)
        while self._window is not None and self._num_unread >= self._window and not self._gone:
            self._room = asyncio.Event()
            await self._room.wait()
        if self._gone:
            raise grpc.aio.InternalError("the call is over")
        self._writing = False
        self._num_unread += 1
        self._initial_sent = True
        self._send("on_message", message)

    async def send_initial_metadata(self, metadata: Trailers) -> None:
        await asyncio.sleep(0)
        self._initial_sent = True
        self._send("on_initial")

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - self._loop.time(), 0.0)

    def invocation_metadata(self) -> Trailers:
        return self._metadata

    def peer(self) -> str:
        return self.connection.channel.process.name

    def cancelled(self) -> bool:
        return self._gone

    def done(self) -> bool:
        return self._task.done()

    def code(self) -> Any:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Trailers:
        return self._status[2]

    def set_code(self, code: Any) -> None:
        self._status = (code, *self._status[1:])

    def set_details(self, details: str) -> None:
        self._status = (self._status[0], details, self._status[2])

    def set_trailing_metadata(self, trailers: Trailers) -> None:
        self._status = (*self._status[:2], trailers)

    async def abort_with_status(self, status: Any) -> None:
        self._status = (status.code, status.details, status.trailing_metadata or ())
        raise grpc.aio.AbortError


def _continuation(handler: Any) -> Callable[[Any], Any]:
    async def proceed(_: Any) -> Any:
        return handler

    return proceed

"""grpc.aio.Channel."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc.aio

from tests.simulation.loop import SimulatedLoop, Violation
from tests.simulation.network import Pipe
from tests.simulation.process import Handle, Process
from tests.simulation.rpc.client_call import ClientCall
from tests.simulation.rpc.connection import Connection
from tests.simulation.rpc.status import Code

if TYPE_CHECKING:
    from tests.simulation.rpc import Rpc
    from tests.simulation.rpc.server import Server

CONNECT_TIMEOUT_S = 2.0
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 2.0


class Channel:
    """grpc.aio.Channel: at most one connection at a time, made when the first call needs it."""

    def __init__(self, rpc: "Rpc", process: Process, address: str, options: dict[str, Any]) -> None:
        self.rpc = rpc
        self.loop: SimulatedLoop = rpc.network.loop
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
        self._timer: Handle | None = None
        self._closed = False

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
        self._timer = self.loop.call_later(CONNECT_TIMEOUT_S, self._failed, attempt, "timed out")
        if listener is None:
            self.loop.call_later(self.rpc.network.delay(), self._failed, attempt, "Connection refused")
            return
        out = Pipe(self.rpc.network, self.process, listener.process)
        back = Pipe(self.rpc.network, listener.process, self.process)
        out.send(self._accepted, attempt, listener, back)

    def _accepted(self, attempt: int, listener: "Server", back: Pipe) -> None:
        """In the server's process."""
        if self.rpc.network.listeners.get(self.address) is listener:
            back.send(self._connected, attempt, listener)
        else:
            back.send(self._failed, attempt, "Connection reset")

    def _connected(self, attempt: int, listener: "Server") -> None:
        if attempt != self._attempt or not self._connecting or self._closed:
            return
        if not listener.process.alive:
            self._failed(attempt, "Connection reset")
            return
        self._end_of_attempt()
        self._back_off_s = FIRST_BACK_OFF_S
        self.connection = Connection(self, listener)
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self.connection.open(call)

    def _end_of_attempt(self) -> None:
        self._connecting = False
        if self._timer is not None:
            self._timer.cancel()

    def _failed(self, attempt: int, why: str) -> None:
        if attempt != self._attempt or not self._connecting:
            return
        self._end_of_attempt()
        self._retry_at = self.loop.time() + self._back_off_s * self.loop.random.uniform(0.8, 1.2)
        self._back_off_s = min(self._back_off_s * 1.6, LONGEST_BACK_OFF_S)
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.end(Code.UNAVAILABLE, f"failed to connect to {self.address}: {why}")

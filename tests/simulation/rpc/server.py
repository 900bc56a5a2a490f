"""grpc.aio.Server."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc

from tests.simulation.process import Process
from tests.simulation.rpc.server_call import ServerCall
from tests.simulation.rpc.status import Code

if TYPE_CHECKING:
    from tests.simulation.rpc import Rpc
    from tests.simulation.rpc.connection import Connection


class Server:
    """grpc.aio.Server."""

    def __init__(self, rpc: "Rpc", process: Process, interceptors: Sequence[Any], options: dict[str, Any]) -> None:
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
            self._handlers[f"/{service}/{name}"] = handler

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
        """Made when it is asked for: most methods never are."""
        handler = self._handlers.get(path)
        return None if handler is None else _without_bytes(handler)

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

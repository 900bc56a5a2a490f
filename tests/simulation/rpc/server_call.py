"""The server's end of a call."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tests.simulation.rpc.status import Arrival, Code, Trailers

if TYPE_CHECKING:
    from tests.simulation.rpc.connection import Connection

WRITE_WAITS = 0.3
"""Share of the writes during which something else may happen."""


class ServerCall:
    """One call at the server: runs the handler in a task, and is its ServicerContext."""

    def __init__(self, connection: "Connection", arrival: Arrival) -> None:
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
        self._begun = False
        self._task = self._loop.create_task(self._run())

    def __hash__(self) -> int:
        return self.number

    async def _run(self) -> None:
        self._begun = True
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
            self._loop.call_later(self._loop.random.uniform(0.0, 0.001), self._cancel)
        else:
            self._writing = False
            self._cancel()

    def abort(self, code: Code, details: str) -> None:
        """By the server itself."""
        self._send("end", code, details, ())
        self._gone = True
        if self._room is not None:
            self._room.set()
        self._cancel()

    def _cancel(self) -> None:
        self._task.cancel()
        if not self._begun:  # and now it never will
            self._end(Code.CANCELLED, "")

    def more_room(self) -> None:
        self._num_unread -= 1
        if self._room is not None:
            self._room.set()

    # ServicerContext.

    async def write(self, message: Any) -> None:
        self._writing = True
        if self._loop.random.random() < WRITE_WAITS:
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

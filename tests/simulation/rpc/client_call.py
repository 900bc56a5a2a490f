"""The client's end of a call."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import TYPE_CHECKING, Any

import grpc.aio

from tests.simulation.process import SimulatedFuture
from tests.simulation.rpc.status import Code, Trailers

if TYPE_CHECKING:
    from tests.simulation.rpc.channel import Channel
    from tests.simulation.rpc.connection import Connection


class ClientCall:
    """grpc.aio.UnaryStreamCall and UnaryUnaryCall."""

    def __init__(self, channel: "Channel", path: str, request: Any, timeout: float | None, metadata: Trailers | None) -> None:
        loop = channel.loop
        self.number = next(loop.numbers)
        self.path = path
        self.request = request
        self.metadata: Trailers = tuple(metadata or ())
        self.deadline = None if timeout is None else loop.time() + timeout
        self.connection: Connection | None = None
        self._channel = channel
        self._received: deque[Any] = deque()
        self._status: tuple[Code, str, Trailers] | None = None
        self._cancelled_here = False
        self._begun = False
        self._waiting_for_begin: list[SimulatedFuture] = []
        self._waiting_for_news: list[SimulatedFuture] = []
        self._waiting_for_end: list[SimulatedFuture] = []
        self._callbacks: list[Callable[[Any], None]] = []
        self._timer = None if timeout is None else loop.call_later(max(timeout, 0.0), self._expire)
        channel.begin(self)

    def __hash__(self) -> int:
        return self.number

    # The server's words.

    def on_initial(self) -> None:
        if not self._begun:
            self._begun = True
            _wake(self._waiting_for_begin)

    def on_message(self, message: Any) -> None:
        if not self._begun:
            self.on_initial()
        self._received.append(message)
        _wake(self._waiting_for_news)

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
        _wake(self._waiting_for_end)
        _wake(self._waiting_for_news)
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
        return (await self._end_of_call())[0]

    async def details(self) -> str:
        return (await self._end_of_call())[1]

    async def trailing_metadata(self) -> Trailers:
        return (await self._end_of_call())[2]

    async def initial_metadata(self) -> Trailers:
        if not self._begun:
            await self._wait(self._waiting_for_begin)
        return ()

    async def read(self) -> Any:
        """As gRPC's own: cancelling whoever reads cancels the call."""
        while not self._received:
            if self._status is not None:
                self._raise_for_status()
                return grpc.aio.EOF
            news = SimulatedFuture(loop=self._channel.loop)
            self._waiting_for_news.append(news)
            try:
                await news
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self._waiting_for_news.remove(news)
        message = self._received.popleft()
        windows = self._channel.rpc.windows
        if windows and self.connection is not None and self._channel.process.name in windows:
            self.connection.taken(self.number)
        return message

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def _response(self) -> Any:
        try:
            await self._end_of_call()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._raise_for_status()
        return self._received[0]

    async def _end_of_call(self) -> tuple[Code, str, Trailers]:
        if self._status is None:
            await self._wait(self._waiting_for_end)
        assert self._status is not None
        return self._status

    async def _wait(self, waiting: list[SimulatedFuture]) -> None:
        future = self._channel.loop.create_future()
        waiting.append(future)
        try:
            await future
        finally:
            waiting.remove(future)

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


def _wake(waiting: list[SimulatedFuture]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)

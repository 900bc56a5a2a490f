"""The one interceptor of every server: parsing, trace context, errors and counts, for all four kinds of call."""

import asyncio
import inspect
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from grpc_status import rpc_status
from opentelemetry import context as trace_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem import error_details  # loaded now: a process without free descriptors can still say so
from tandem.errors import Outcome, Reason, TandemError

logger = logging.getLogger(__name__)

# Methods that show state for as long as the caller wants. They must not hold up shutdown, so they are ended by the server.
OBSERVERS = frozenset({"Watch", "Follow", "ServerReflectionInfo"})

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]

_propagator = TraceContextTextMapPropagator()


@dataclass
class CallCounts:
    """Calls of one method. Once all calls have ended, received == ok + cancelled + rejected + failed."""

    received: int = 0
    ok: int = 0
    cancelled: int = 0
    rejected: int = 0
    failed: int = 0


def _shutting_down() -> TandemError:
    return TandemError(Reason.DRAINING, "the server is shutting down")


@dataclass(eq=False)
class Call:
    """One running call. `dismissal` makes what it ends with if the server dismisses it."""

    method: str
    task: asyncio.Task[Any]
    dismissed: bool = False
    dismissal: Callable[[], TandemError] = _shutting_down

    @property
    def observes(self) -> bool:
        return self.method.rpartition("/")[2] in OBSERVERS


_current: ContextVar[Call] = ContextVar("call")


def when_dismissed(dismissal: Callable[[], TandemError]) -> None:
    """In a handler: what its call ends with if the server, at its end, cannot wait for it; DRAINING otherwise."""
    _current.get().dismissal = dismissal


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler. Handlers are coroutine functions or async generators that raise TandemError.

    A call ends in exactly one way: OK, the TandemError's status, INTERNAL with a logged id, or cancelled. Handlers clean up in
    `finally`, and async generators are closed before the call ends, also when the client goes away during a write.
    """

    def __init__(self) -> None:
        self.counts: dict[str, CallCounts] = defaultdict(CallCounts)
        self._running: set[Call] = set()
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def dismiss_observers(self) -> None:
        """Ends the calls that only watch, with UNAVAILABLE/DRAINING."""
        _dismiss(call for call in self._running if call.observes)

    async def dismiss_requests(self, timeout_s: float) -> None:
        """Ends all other calls in the same way, and waits for them, not longer than `timeout_s`."""
        requests = [call for call in self._running if not call.observes]
        _dismiss(requests)
        if requests:
            await asyncio.wait([call.task for call in requests], timeout=timeout_s)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None
        if method not in self._handlers:
            self._handlers[method] = self._wrapped(handler, method)
        return self._handlers[method]

    def _wrapped(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        parse = _parse_stream if handler.request_streaming else _parse
        generates = handler.response_streaming and not inspect.iscoroutinefunction(behaviour)  # or it writes by itself
        answer = _answer_stream if generates else _answer

        async def serve(payload: Any, context: grpc.aio.ServicerContext) -> Any:
            return await self._serve(
                method, context, lambda: answer(behaviour, parse(handler.request_deserializer, payload), context)
            )

        return _MAKE_HANDLER[handler.request_streaming, handler.response_streaming](serve, None, handler.response_serializer)

    async def _serve(self, method: str, context: grpc.aio.ServicerContext, answer: Callable[[], Awaitable[Any]]) -> Any:
        call, counts = self._enter(method)
        current = _current.set(call)
        token = trace_context.attach(_propagator.extract(_trace_headers(context)))
        try:
            response = await answer()
            _count(counts, _outcome_of_code(context.code()))
            return response
        except asyncio.CancelledError as raised:
            if call.task.cancelling() and not call.dismissed:
                counts.cancelled += 1
                raise
            error = call.dismissal() if call.dismissed else _as_tandem_error(raised, method)
        except grpc.aio.AbortError:
            _count(counts, _outcome_of_code(context.code()))
            raise
        except grpc.aio.InternalError:
            # The client went away during a write; gRPC itself knows and expects this exception.
            counts.cancelled += 1
            raise
        except Exception as raised:
            error = _as_tandem_error(raised, method)
        finally:
            trace_context.detach(token)
            _current.reset(current)  # the task's context would hold the call, and so the task, for as long as itself
            self._running.discard(call)
        _count(counts, error.outcome)
        error.__traceback__ = None  # it would hold this frame, which holds the error
        await _abort(context, error)

    def _enter(self, method: str) -> tuple[Call, CallCounts]:
        task = asyncio.current_task()
        assert task is not None, "gRPC runs every handler in a task"
        call, counts = Call(method, task), self.counts[method]
        self._running.add(call)
        counts.received += 1
        return call, counts


_MAKE_HANDLER: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _dismiss(calls: Iterable[Call]) -> None:
    for call in calls:
        call.dismissed = True
        call.task.cancel()


def _parse(deserialize: Callable[[bytes], Any] | None, payload: bytes) -> Any:
    """The request. gRPC itself would answer a malformed one with INTERNAL."""
    if deserialize is None:
        return payload
    try:
        return deserialize(payload)
    except DecodeError as error:
        raise TandemError(Reason.MESSAGE_MALFORMED, "the request's bytes are not a message of the method's request type") from error


async def _parse_stream(deserialize: Callable[[bytes], Any] | None, payloads: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for payload in payloads:
        yield _parse(deserialize, payload)


async def _answer(behaviour: Behaviour, request: Any, context: grpc.aio.ServicerContext) -> Any:
    return await behaviour(request, context)


async def _answer_stream(behaviour: Behaviour, request: Any, context: grpc.aio.ServicerContext) -> None:
    """Writes by itself, so that an error in a write closes the handler's generator here and now and not when it is collected."""
    async with aclosing(behaviour(request, context)) as responses:
        async for response in responses:
            await context.write(response)


async def _abort(context: grpc.aio.ServicerContext, error: TandemError) -> None:
    """Ends the call with the error's status. A client that has gone meanwhile is no error of ours, for which gRPC would take it."""
    try:
        await context.abort_with_status(rpc_status.to_status(error_details.encode(error)))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _trace_headers(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if key in ("traceparent", "tracestate")}


def _as_tandem_error(raised: BaseException, method: str) -> TandemError:
    """Whatever a handler raised. A CancelledError comes here if nobody cancelled the handler: let through, it would leave the
    client waiting for ever (a handler raises one when a call of its own was cancelled elsewhere)."""
    if isinstance(raised, TandemError):
        return raised
    error_id = uuid.uuid4().hex
    logger.error("%s failed; error id %s", method, error_id, exc_info=raised)
    return TandemError(
        Reason.INTERNAL, f"internal error; the server's log has it under {error_id}", metadata={"error_id": error_id}
    )


def _outcome_of_code(code: Any) -> Outcome | None:
    """How a code that a handler set by itself counts; gRPC gives None, or 0, while none is set."""
    if not code or code is grpc.StatusCode.OK:
        return None
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS):
        return "failed"
    return "cancelled" if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED) else "rejected"


def _count(counts: CallCounts, outcome: Outcome | None) -> None:
    key = outcome or "ok"
    setattr(counts, key, getattr(counts, key) + 1)

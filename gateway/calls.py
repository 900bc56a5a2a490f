"""Reading a worker's stream, and ending tasks and calls for good."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import grpc
import grpc.aio

from tandem.errors import Reason, TandemError, from_rpc_error


async def read(call: grpc.aio.UnaryStreamCall) -> Any | None:
    """The next message, None at the end of the stream. Raises the worker's TandemError, or WORKER_LOST."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    except asyncio.CancelledError:
        # A status CANCELLED from the worker looks like a cancellation of this task, which it is not.
        if _being_cancelled():
            raise
        raise TandemError(Reason.WORKER_LOST, "the worker ended the call") from None
    return None if message is grpc.aio.EOF else message


async def end(call: grpc.aio.UnaryStreamCall) -> None:
    """Cancels a call, if it still runs, and waits until it is over here."""
    if call.cancel():
        await call.code()


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until their `finally` blocks have run; their results and failures are of no interest."""
    for task in tasks:
        task.cancel()
    cancelled = await _until_done(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio logs that nobody asked for it
    if cancelled is not None:
        raise cancelled


async def see_through(work: Awaitable[Any]) -> None:
    """Waits for `work` to its end, also if the caller is cancelled meanwhile; only then the cancellation is let through.

    A request can be cancelled twice: by its deadline in the client and by the same deadline here.
    """
    running = asyncio.ensure_future(work)
    cancelled = await _until_done((running,))
    running.result()
    if cancelled is not None:
        raise cancelled


async def _until_done(futures: Sequence[asyncio.Future[Any]]) -> asyncio.CancelledError | None:
    """The last cancellation that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while running := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

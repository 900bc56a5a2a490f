"""The consumer's client of KvTransferService."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from kvtransfer.pull_state import InterruptedPullError
from kvtransfer.ticket import KvTicket
from tandem.channels import call_metadata
from tandem.errors import Reason, TandemError, from_rpc_error
from tandem.worker.v1 import kv_pb2, kv_pb2_grpc

RELEASE_TIMEOUT_S = 2.0
SEND_TIMEOUT_S = 2.0


class ControlClient:
    """Calls one producer over a channel of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub = kv_pb2_grpc.KvTransferServiceStub(channel)  # type: ignore[no-untyped-call]

    async def release(self, ticket: KvTicket) -> None:
        request = kv_pb2.ReleaseRequest(ticket_id=ticket.ticket_id, epoch=ticket.epoch)
        try:
            await self._stub.Release(request, metadata=call_metadata(), timeout=RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    @asynccontextmanager
    async def membership(self, link_id: str, unique_id: bytes) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Has the producer join a communicator, and stay while the context lasts. Entered once it has begun to.

        What the context gives returns when the producer has joined. Either raises the error by which it refused or failed.
        """
        request = kv_pb2.JoinLinkRequest(link_id=link_id, unique_id=unique_id)
        call = self._stub.JoinLink(request, metadata=call_metadata())
        try:
            await _response(call)
            yield lambda: _response(call)
        finally:
            call.cancel()

    @asynccontextmanager
    async def sending(self, link_id: str, ticket: KvTicket, first_block_index: int, num_blocks: int) -> AsyncIterator[None]:
        """Entered when the producer is about to send the blocks over the link. Raises the error by which it refused."""
        request = kv_pb2.SendBlocksRequest(
            link_id=link_id,
            ticket_id=ticket.ticket_id,
            epoch=ticket.epoch,
            first_block_index=first_block_index,
            num_blocks=num_blocks,
        )
        call = self._stub.SendBlocks(request, metadata=call_metadata())
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await _response(call)
            yield
            await _ended(call)
        except TimeoutError as error:
            raise InterruptedPullError(f"no answer within {SEND_TIMEOUT_S} s") from error
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


async def _ended(call: grpc.aio.UnaryStreamCall) -> None:
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        raise _translated(error) from error


async def _response(call: grpc.aio.UnaryStreamCall) -> None:
    try:
        if await call.read() is grpc.aio.EOF:
            raise TandemError(Reason.TRANSFER_INTERRUPTED, "the producer ended the call early")
    except grpc.aio.AioRpcError as error:
        raise _translated(error) from error


def _translated(error: grpc.aio.AioRpcError) -> TandemError | InterruptedPullError:
    """A producer never sends WORKER_LOST itself: that is gRPC's word for a broken connection."""
    translated = from_rpc_error(error)
    return InterruptedPullError(translated.message) if translated.reason is Reason.WORKER_LOST else translated

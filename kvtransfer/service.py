"""KvTransferService: what consumers ask of a producer beside the KV port."""

import asyncio

import grpc

from kvtransfer.links import Links
from kvtransfer.producer import KvProducer
from tandem.errors import Reason, TandemError
from tandem.server import Server
from tandem.worker.v1 import kv_pb2, kv_pb2_grpc

SERVICE = "tandem.worker.v1.KvTransferService"


class KvTransferServicer(kv_pb2_grpc.KvTransferServiceServicer):
    """Serves a producer."""

    def __init__(self, producer: KvProducer) -> None:
        self._producer = producer

    async def JoinLink(self, request: kv_pb2.JoinLinkRequest, context: grpc.aio.ServicerContext) -> None:
        links = self._links()
        with links.place():
            await context.write(kv_pb2.JoinLinkResponse())
            async with links.joined(request.link_id, request.unique_id):
                await context.write(kv_pb2.JoinLinkResponse())
                await asyncio.Event().wait()  # until the caller leaves, or is seen to be gone

    async def SendBlocks(self, request: kv_pb2.SendBlocksRequest, context: grpc.aio.ServicerContext) -> None:
        producer, first, count = self._producer, request.first_block_index, request.num_blocks
        block_ids = producer.ready_blocks(request.ticket_id, request.epoch)[first : first + count]
        if not 0 < len(block_ids) == count:
            raise TandemError(Reason.INVALID_REQUEST, "only blocks that were told can be sent")
        async with self._links().turn(request.link_id, block_ids) as send:
            producer.check(request.ticket_id, request.epoch)
            await context.write(kv_pb2.SendBlocksResponse())
            await send()

    def _links(self) -> Links:
        if self._producer.links is None:
            raise TandemError(Reason.KV_LAYOUT_MISMATCH, "NCCL links are for KV in GPU memory")
        return self._producer.links

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseResponse:
        self._producer.release(request.ticket_id, request.epoch)
        return kv_pb2.ReleaseResponse()


def add_transfer_service(server: Server, producer: KvProducer) -> None:
    """Before the server starts."""
    server.add(kv_pb2_grpc.add_KvTransferServiceServicer_to_server, KvTransferServicer(producer), SERVICE)

"""KvTransferService: the control side of the hand-off, at the producer."""

from contextlib import aclosing

import grpc

from kvtransfer.producer import KvProducer
from kvtransfer.wire import frame_to_proto
from tandem.worker.v1 import kv_pb2, kv_pb2_grpc


class KvTransferServicer(kv_pb2_grpc.KvTransferServiceServicer):
    """Serves `Pull` and `Release` from a producer."""

    def __init__(self, producer: KvProducer) -> None:
        self._producer = producer

    async def Pull(self, request: kv_pb2.PullRequest, context: grpc.aio.ServicerContext) -> None:
        # The first frame may be long in coming; this tells the caller at once that somebody is there.
        await context.send_initial_metadata(())
        frames = self._producer.frames(request.ticket_id, request.epoch, request.first_block_index)
        async with aclosing(frames):
            async for frame in frames:
                await context.write(frame_to_proto(frame, request.ticket_id, self._producer.block_bytes))

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseResponse:
        self._producer.release(request.ticket_id, request.epoch)
        return kv_pb2.ReleaseResponse()

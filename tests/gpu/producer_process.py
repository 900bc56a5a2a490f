"""A producer of KV blocks in a process of its own: `python -m tests.gpu.producer_process ADDRESS DEVICE`.

It grants one ticket over a pool of random content, tells it in chunks, and prints two lines: the ticket's message in hex, and the
checksum of all its blocks' bytes. A line on standard input then makes it damage a block; the end of input ends it in good order.
"""

import asyncio
import sys

import torch
import xxhash

from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.service import KvTransferServicer
from kvtransfer.wire import ticket_to_proto
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.server import Server, ServerSettings, run
from tandem.worker.v1 import kv_pb2_grpc

LAYOUT = KvLayout(num_layers=4, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16")
NUM_BLOCKS = 700
BLOCK_IDS = [*range(699, 99, -2), 0]
FIRST_TOKEN = 4711


async def main() -> None:
    address, device = sys.argv[1:]
    pool = KvPool.create(LAYOUT, NUM_BLOCKS, device)
    pool.tensor.normal_()
    identity = ProducerIdentity("p" * 32, "model", "tokenizer", address)
    producer = KvProducer(pool, identity, lease_s=30.0, free=lambda block_ids: None)
    server = Server("test", ServerSettings(port=int(address.rpartition(":")[2]), grace_s=0.1))
    server.add(
        kv_pb2_grpc.add_KvTransferServiceServicer_to_server, KvTransferServicer(producer), "tandem.worker.v1.KvTransferService"
    )
    await producer.start()
    await server.start()
    ticket = producer.grant(1, len(BLOCK_IDS) * LAYOUT.block_tokens, BLOCK_IDS)
    for num_ready in (1, 100, 290):
        producer.progress(ticket.ticket_id, num_ready)
    producer.finish(ticket.ticket_id, FIRST_TOKEN)
    outbox = producer._outboxes[ticket.ticket_id]
    while outbox.num_checksums < len(BLOCK_IDS):  # noqa: ASYNC110 - a block damaged before its checksum is taken is not damaged
        await asyncio.sleep(0.001)
    print(ticket_to_proto(ticket).SerializeToString().hex(), checksum(pool, BLOCK_IDS), sep="\n", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        pool.tensor[BLOCK_IDS[40]].view(-1)[7] += 1
        if pool.on_device:
            torch.cuda.synchronize()
        print("damaged", flush=True)
    server.stop()
    await server.run_until_stopped(no_step, producer.close)
    pool.close()


def checksum(pool: KvPool, block_ids: list[int]) -> int:
    """Of all the blocks' bytes, on the host."""
    return int(xxhash.xxh3_64_intdigest(pool.tensor[block_ids].cpu().view(torch.uint8).numpy().tobytes()))


async def no_step() -> None:
    """There is nothing to drain."""


if __name__ == "__main__":
    run(main())

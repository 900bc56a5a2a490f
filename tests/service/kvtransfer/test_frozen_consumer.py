"""A consumer process that is stopped in the middle of its pull, and woken when its blocks are long another's."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest

from kvtransfer.ticket import KvTicket
from kvtransfer.wire import ticket_to_proto
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, LEASE_S, transfer

CONSUMER = """
import asyncio, sys
from kvtransfer.puller import KvPuller
from kvtransfer.wire import ticket_from_proto
from llm.kv.pool import KvPool
from tandem.channels import open_internal_channel
from tandem.errors import TandemError
from tandem.worker.v1 import kv_pb2

async def main():
    ticket = ticket_from_proto(kv_pb2.KvTicket.FromString(bytes.fromhex(sys.argv[2])))
    pool = KvPool.create(ticket.layout, 8)
    puller = KvPuller(pool, ticket.layout, "model", "tokenizer", channels=open_internal_channel, transports=(sys.argv[1],))
    try:
        await puller.pull(ticket, range(8))
        print("PULLED")
    except TandemError as error:
        print(error.reason.value)
    await puller.close()

asyncio.run(main())
"""


@asynccontextmanager
async def consumer(transport: str, ticket: KvTicket) -> AsyncIterator[Process]:
    message = ticket_to_proto(ticket).SerializeToString().hex()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CONSUMER, transport, message, stdout=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_frozen_consumers_blocks_are_freed_and_it_takes_in_nothing_when_woken(transport: str) -> None:
    async with transfer() as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 7)
        async with consumer(transport, ticket) as process:
            await at.until(lambda: at.heard(ticket) and at.num_readers(ticket) == 1)
            process.send_signal(signal.SIGSTOP)
            await at.until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
            at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
            at.wait(LEASE_S - 0.1)
            assert at.freed == []
            at.wait(0.1)
            assert at.freed == [ticket.block_ids]
            await at.until(lambda: at.num_readers(ticket) == 0)
            for block in ticket.block_ids:
                at.source.generations.bump(block)
                at.source.block_view(block)[:] = bytes(LAYOUT.block_bytes)
            process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(60):
                ending, _ = await process.communicate()
        assert ending.decode().strip() in ("TICKET_NOT_FOUND", "TRANSFER_INTERRUPTED")

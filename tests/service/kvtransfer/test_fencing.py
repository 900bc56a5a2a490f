"""Blocks that are reused while somebody still reads them: noticed on every transport, whatever the bytes are by then."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer import host_blocks
from kvtransfer.connection import Connection
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.kv_messages import PullMessage, encode
from kvtransfer.ticket import TcpOffer
from llm.kv.allocator import BlockAllocator
from llm.kv.block_arrays import Sums
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError
from tests.service.kvtransfer.harness import LAYOUT, LEASE_S, NUM_BLOCKS, transfer

MINE = tuple(range(20, 28))


@pytest.fixture(autouse=True)
def copies_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few blocks would be copied on the event loop, which a test cannot hold."""
    monkeypatch.setattr(host_blocks, "HERE_BYTES", 0)


@contextmanager
def frozen_copies(monkeypatch: pytest.MonkeyPatch, *, after: bool) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Holds a reader's thread before or after its copy, as SIGSTOP would: `entered`, and `leave` for the test to set."""
    whole, entered, leave = HostBlocks.fetch, threading.Event(), threading.Event()

    def fetch(*arguments: Any) -> Sums:
        found = whole(*arguments) if after else None
        entered.set()
        assert leave.wait(30)
        return whole(*arguments) if found is None else found

    monkeypatch.setattr(HostBlocks, "fetch", fetch)
    yield entered, leave
    leave.set()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("end", ["expired", "released"])
async def test_a_mapped_block_in_other_use_is_never_taken_in(monkeypatch: pytest.MonkeyPatch, end: str, after: bool) -> None:
    """The block's bytes stay what they were, so its checksum could not tell; and no block comes after it."""
    async with transfer("shm") as at:
        ticket = at.complete((0,))
        with frozen_copies(monkeypatch, after=after) as (entered, leave):
            pulling = asyncio.create_task(at.puller.pull(ticket, MINE[:1]))
            await asyncio.to_thread(entered.wait, 30)
            if end == "expired":
                at.producer._ledger.pulse.beat = lambda ticket_id, epoch: True  # type: ignore[method-assign]
                at.clock.now += 100
                at.wait(0)
            else:
                at.producer.release(ticket.ticket_id, ticket.epoch)
            assert at.freed == [ticket.block_ids], "an open stream does not hold blocks back"
            for block in ticket.block_ids:
                at.source.generations.bump(block)
            leave.set()
            with pytest.raises(TandemError) as caught:
                await pulling
        assert caught.value.reason is Reason.TICKET_NOT_FOUND
        assert [row.stale for row in at.puller.counters()] == [1]


async def test_a_block_shared_with_a_later_prompt_stays_readable() -> None:
    """What the prefix cache hands on does not change, so it is not fenced off."""
    async with transfer("shm") as at:
        allocator = BlockAllocator(NUM_BLOCKS, LAYOUT.block_tokens, True, at.source.generations.bump)
        tokens = list(range(2 * LAYOUT.block_tokens))
        first = allocator.allocate_prompt(tokens)
        allocator.commit(tokens, first.block_ids, len(tokens))
        ticket = at.complete(first.block_ids)
        allocator.free(first.block_ids)
        second = allocator.allocate_prompt([*tokens, 1])
        assert second.block_ids[:2] == first.block_ids
        later = at.complete(second.block_ids)
        await at.puller.pull(ticket, MINE[:2])
        await at.puller.pull(later, MINE[:3])
        allocator.free(second.block_ids)
        allocator.allocate(NUM_BLOCKS)
        for stale in (ticket, later):
            with pytest.raises(TandemError) as caught:
                await at.puller.pull(stale, MINE[: len(stale.block_ids)])
            assert caught.value.reason is Reason.TICKET_NOT_FOUND


async def test_memory_without_a_fence_is_not_read() -> None:
    async with transfer() as at:
        ticket = at.complete()
        assert ticket.fence is not None
        unfenced = replace(ticket, fence=None)
        assert str(await at.puller.choose(unfenced)) == "tcp: producer does not fence its blocks"
        foreign = replace(ticket, fence=replace(ticket.fence, file=replace(ticket.fence.file, inode=1)))
        assert (await at.puller.choose(foreign)).transport == "tcp"


async def test_a_sender_stops_with_its_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that does not read has the sender wait in the middle of a block. Once the lease is over no byte more is sent.

    The blocks are far more than the kernel buffers, so most of them are still to be sent when it waits.
    """
    waits, writable = list[Connection](), Connection._writable

    async def noted(self: Connection) -> None:
        waits.append(self)
        await writable(self)

    monkeypatch.setattr(Connection, "_writable", noted)
    async with transfer("tcp", make_pool=large_pool) as at:
        ticket = await at.sealed(tuple(range(NUM_BLOCKS)))
        offer = next(offer for offer in ticket.offers if isinstance(offer, TcpOffer))
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (offer.host, offer.port))
            await loop.sock_sendall(sock, encode(PullMessage(ticket.ticket_id, ticket.epoch, 0, 1)))
            await at.until(lambda: bool(waits))
            at.wait(LEASE_S)
            assert at.freed == [ticket.block_ids]
            for block in ticket.block_ids:
                at.source.block_view(block)[:] = OTHERS * at.source.layout.block_bytes
            num_received, foreign = await received(sock)
        assert not foreign, "bytes of the block's next user"
        assert 0 < num_received < NUM_BLOCKS * at.source.layout.block_bytes // 2


OTHERS = b"\xee"


def large_pool(layout: KvLayout, num_blocks: int) -> KvPool:
    return KvPool.create(replace(layout, head_dim=256 * layout.head_dim), num_blocks)


async def received(sock: socket.socket) -> tuple[int, bool]:
    """Reads until the end, or until bytes come that were written into the blocks later. How many came, and whether those did."""
    num_bytes = 0
    try:
        while part := await asyncio.get_running_loop().sock_recv(sock, 1 << 18):
            num_bytes += len(part)
            if OTHERS * 64 in part:
                return num_bytes, True
    except ConnectionError:
        pass
    return num_bytes, False

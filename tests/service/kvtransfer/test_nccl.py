"""The nccl transport over a faked NCCL: links are made, shared, capped, lost and given back."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvtransfer.ticket import KvTicket, NcclOffer
from kvtransfer.transports import nccl_link
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError
from tests.fakes import nccl_calls
from tests.fakes.cuda_calls import FakeCuda
from tests.fakes.nccl_calls import FakeNccl
from tests.service.kvtransfer.gpu_harness import fake_gpus, gpu_pool
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, Transfer, transfer

MINE = [7, 3, 30, 11, 0, 22, 5, 38]
OTHERS = [8, 4, 31, 12, 1, 23, 6, 39]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_gpus(monkeypatch)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    monkeypatch.setattr(nccl_link, "ROOM_BYTES", 3 * LAYOUT.block_bytes)
    return nccl_calls.install(monkeypatch)


@asynccontextmanager
async def between_gpus(*transports: str) -> AsyncIterator[Transfer]:
    numbers = [0, 1]

    def make_pool(layout: KvLayout, num_blocks: int) -> KvPool:
        return gpu_pool(layout, num_blocks, numbers.pop())

    async with transfer(*(transports or ("nccl", "tcp")), make_pool=make_pool) as at:
        yield at


def with_offer(ticket: KvTicket, **fields: object) -> KvTicket:
    offers = (replace(offer, **fields) if isinstance(offer, NcclOffer) else offer for offer in ticket.offers)  # type: ignore[arg-type]
    return replace(ticket, offers=tuple(offers))


async def test_blocks_arrive_and_the_link_is_made_once_and_ended(nccl: FakeNccl) -> None:
    async with between_gpus("nccl") as at:
        for _ in range(2):
            ticket = at.grant()
            at.producer.progress(ticket.ticket_id, 3)
            at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
            at.target.tensor.zero_()
            result = await at.puller.pull(ticket, MINE)
            assert (result.transport, result.first_token_id) == ("nccl", FIRST_TOKEN)
            assert at.arrived(ticket, MINE)
            untouched = [block for block in range(at.target.num_blocks) if block not in MINE]
            assert not at.target.tensor[untouched].any()
        assert len(nccl.communicators) == 2, "one link, which has two ends"
    assert all(communicator.aborted for communicator in nccl.communicators)


async def test_pulls_take_turns_on_one_link(nccl: FakeNccl) -> None:
    async with between_gpus("nccl") as at:
        tickets = [at.complete(range(8)), at.complete(range(8, 16))]
        await asyncio.gather(*(at.puller.pull(ticket, ids) for ticket, ids in zip(tickets, (MINE, OTHERS), strict=True)))
        assert at.arrived(tickets[0], MINE)
        assert at.arrived(tickets[1], OTHERS)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device_uuid": "a" * 32}, "NCCL does not join two processes of one GPU"),
        ({"nccl_version": 1}, "producer's NCCL is 1, this worker's 22809"),
    ],
)
async def test_else_tcp_with_the_reason(nccl: FakeNccl, fields: dict[str, object], reason: str) -> None:
    async with between_gpus() as at:
        ticket = with_offer(at.complete(), **fields)
        assert str(await at.puller.choose(ticket)).endswith(reason)
        assert (await at.puller.pull(ticket, MINE)).transport == "tcp"


async def test_a_producer_with_too_many_links_sends_by_tcp(nccl: FakeNccl) -> None:
    async with between_gpus() as at:
        assert at.producer.links is not None
        at.producer.links._num_taken = nccl_link.MAX_LINKS
        assert "the producer has 4 NCCL links already" in str(await at.puller.choose(at.complete()))
        at.producer.links._num_taken = 0
        assert (await at.puller.pull(at.complete(), MINE)).transport == "tcp", "it is tried once"


async def test_without_nccl_the_producer_does_not_offer_it() -> None:
    async with between_gpus() as at:
        assert at.producer.transports == ("cuda_ipc", "tcp")
        assert "producer does not offer nccl" in str(await at.puller.choose(at.complete()))


async def test_a_side_that_does_not_join_costs_a_moment_only(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.nccl_link._join", refuse)
    async with between_gpus() as at:
        assert (await at.puller.pull(at.complete(), MINE)).transport == "tcp"


def refuse(unique_id: bytes, rank: int, device: int) -> None:
    raise nccl_link.LinkError("the other side did not join within 4 s")


async def test_a_lost_link_is_replaced_by_tcp_in_the_same_pull(nccl: FakeNccl) -> None:
    async with between_gpus() as at:
        assert (await at.puller.pull(at.complete(), MINE)).transport == "nccl"
        nccl.cut = True
        ticket = at.complete()
        result = await at.puller.pull(ticket, MINE)
        assert (result.transport, result.num_resumed) == ("tcp", 1)
        assert at.arrived(ticket, MINE)


async def test_a_damaged_block_is_refused(nccl: FakeNccl) -> None:
    async with between_gpus("nccl") as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 8)
        await at.until(lambda: at.producer._outboxes[ticket.ticket_id].num_checksums == 8)
        at.flip(5)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert (caught.value.reason, caught.value.metadata["block_index"]) == (Reason.KV_CHECKSUM_MISMATCH, "5")


async def test_a_cancelled_pull_leaves_the_link_in_step(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, whole = threading.Event(), threading.Event(), nccl_calls.Communicator.receive

    def held(end: nccl_calls.Communicator, pointer: int, num_bytes: int, stream: int) -> None:
        entered.set()
        assert leave.wait(30)
        whole(end, pointer, num_bytes, stream)

    async with between_gpus("nccl") as at:
        await at.puller.pull(at.complete(), MINE)
        monkeypatch.setattr(nccl_calls.Communicator, "receive", held)
        pulling = asyncio.create_task(at.puller.pull(at.complete(), MINE))
        await asyncio.to_thread(entered.wait, 30)
        pulling.cancel()
        await asyncio.sleep(0)
        assert not pulling.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        ticket = at.complete(OTHERS)
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)

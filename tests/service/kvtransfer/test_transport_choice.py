"""Which transport is taken, and what is said about it."""

from dataclasses import replace

import pytest

from kvtransfer.ticket import KvTicket, ShmOffer, TcpOffer
from tandem.errors import Reason, TandemError
from tests.service.kvtransfer.harness import transfer


def with_shm(ticket: KvTicket, **fields: object) -> KvTicket:
    return replace(
        ticket, offers=tuple(replace(offer, **fields) if isinstance(offer, ShmOffer) else offer for offer in ticket.offers)
    )


async def test_shared_memory_where_possible() -> None:
    async with transfer() as at:
        assert str(await at.puller.choose(at.complete())) == "shm: same host, mapped read-only"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"boot_id": "another"}, "tcp: producer runs on another host (boot id differs)"),
        ({"boot_id": ""}, "tcp: producer runs on another host (boot id differs)"),
        ({"pid": 2**30}, "tcp: producer's process is not visible from here (ended, or in another container)"),
        ({"fd": 0}, "tcp: "),
        ({"inode": 1}, "tcp: what the offer names is not the producer's memory (inode or size differs)"),
        ({"pool_bytes": 2**40}, "tcp: what the offer names is not the producer's memory (inode or size differs)"),
        ({"pool_bytes": 1}, "tcp: ticket names blocks outside of the offered memory"),
    ],
)
async def test_else_tcp_with_the_reason(fields: dict[str, object], reason: str) -> None:
    async with transfer() as at:
        ticket = with_shm(at.complete(), **fields)
        assert str(await at.puller.choose(ticket)).startswith(reason)
        assert (await at.puller.pull(ticket, range(20, 28))).transport == "tcp"


async def test_what_is_not_offered_or_switched_off() -> None:
    async with transfer("tcp") as at:
        assert str(await at.puller.choose(at.complete())) == "tcp: shm is switched off here"
    async with transfer() as at:
        ticket = at.complete()
        only_tcp = replace(ticket, offers=tuple(offer for offer in ticket.offers if isinstance(offer, TcpOffer)))
        assert str(await at.puller.choose(only_tcp)) == "tcp: producer does not offer shm"
    async with transfer("tcp", "shm") as at:
        assert str(await at.puller.choose(at.complete())) == "tcp: preferred here"


async def test_no_transport_in_common() -> None:
    async with transfer("shm") as at:
        with pytest.raises(TandemError, match="boot id differs") as caught:
            await at.puller.choose(with_shm(at.complete(), boot_id="another"))
        assert caught.value.reason is Reason.KV_LAYOUT_MISMATCH


async def test_memory_is_taken_from_its_own_producer_only() -> None:
    async with transfer() as at:
        ticket = at.complete()
        await at.puller.pull(ticket, range(20, 28))
        impostor = replace(ticket, producer_id="another", address="127.0.0.1:1")
        assert str(await at.puller.choose(impostor)) == "tcp: offered memory is that of another producer (producer id differs)"
        other = with_shm(ticket, inode=1)
        assert str(await at.puller.choose(other)) == "tcp: producer has offered other memory before under the same id"


async def test_a_producer_is_mapped_once_and_dropped_when_another_takes_its_place() -> None:
    async with transfer() as at:
        for _ in range(2):
            await at.puller.pull(at.complete(), range(20, 28))
        (peer,) = at.puller._peers._peers.values()
        mapping = peer.mapping
        assert mapping is not None and mapping.file == at.complete().offers[0].file
        successor = replace(at.complete(), producer_id="restarted")
        assert (await at.puller.choose(successor)).transport == "shm"
        (new,) = at.puller._peers._peers.values()
        assert new is not peer and new.producer_id == "restarted"
        await at.until(lambda: mapping._memory.closed)

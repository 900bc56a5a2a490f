"""How the producer hears that a consumer has all of a ticket's blocks: over a KV connection, else by a call."""

from dataclasses import replace

from tests.service.kvtransfer.harness import transfer
from tests.service.kvtransfer.test_hand_off import MINE, both_transports


@both_transports
async def test_of_a_pulled_ticket_the_producer_hears_without_a_call(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        await at.puller.pull(ticket, MINE)
        await at.server.stop(None)
        await at.puller.release(ticket)
        await at.until(lambda: at.freed == [ticket.block_ids])


async def test_a_release_finds_its_way_where_the_connection_is_closed() -> None:
    async with transfer("shm") as at:
        ticket = at.complete()
        await at.puller.pull(ticket, MINE)
        await at.producer._server.close()
        await at.puller.release(ticket)
        assert at.freed == [ticket.block_ids]


async def test_word_of_another_epochs_release_frees_nothing_and_harms_no_later_pull() -> None:
    async with transfer("shm") as at:
        ticket = at.complete()
        await at.puller.pull(ticket, MINE)
        with at.puller._peers.using(ticket) as peer:
            assert await peer.tell_released(replace(ticket, epoch=7))
        await at.puller.pull(ticket, MINE)
        assert at.freed == []

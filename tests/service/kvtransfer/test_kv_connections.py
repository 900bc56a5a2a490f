"""Connections to a KV port do not outlive their use."""

import asyncio

import pytest

from kvtransfer import kv_server
from kvtransfer.connections import MAX_IDLE_CONNECTIONS, Answer, Connections
from kvtransfer.ticket import KvTicket
from tests.service.kvtransfer.harness import Transfer, transfer


async def hear(answer: Answer) -> None:
    async for frame in answer.frames():
        if frame.first_token_id is not None:
            return


async def pull(connections: Connections, ticket: KvTicket) -> None:
    async with connections.pulling(ticket, 0, with_blocks=False) as answer:
        await hear(answer)


def opened(at: Transfer, ticket: KvTicket) -> Connections:
    assert ticket.kv_port is not None
    return Connections(ticket.kv_port)


async def test_a_connection_serves_one_pull_after_the_other() -> None:
    async with transfer() as at:
        ticket = await at.sealed()
        connections = opened(at, ticket)
        await pull(connections, ticket)
        (first,) = connections._idle
        await pull(connections, ticket)
        assert connections._idle == [first]
        connections.close()


async def test_few_are_kept_when_many_pulls_end() -> None:
    async with transfer() as at:
        ticket = await at.sealed()
        connections = opened(at, ticket)
        await asyncio.gather(*(pull(connections, ticket) for _ in range(2 * MAX_IDLE_CONNECTIONS)))
        assert len(connections._idle) == MAX_IDLE_CONNECTIONS
        connections.close()


async def test_one_that_the_producer_closes_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody need ask for it: a consumer without work holds no descriptor for long."""
    monkeypatch.setattr(kv_server, "IDLE_S", 0.01)
    async with transfer() as at:
        ticket = await at.sealed()
        connections = opened(at, ticket)
        await pull(connections, ticket)
        (idle,) = connections._idle
        await at.until(lambda: not connections._idle)
        assert idle._socket.fileno() < 0
        await pull(connections, ticket)
        connections.close()


async def test_one_that_is_in_use_when_all_are_closed_is_closed_after_its_pull() -> None:
    async with transfer() as at:
        ticket = await at.sealed()
        connections = opened(at, ticket)
        async with connections.pulling(ticket, 0, with_blocks=False) as answer:
            connections.close()
            await hear(answer)
        assert connections._idle == []
        assert answer._connection._socket.fileno() < 0

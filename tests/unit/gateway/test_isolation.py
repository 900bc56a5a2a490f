"""Suspected requests go to a worker one at a time, and wait for their turn, but not for ever."""

import asyncio

from gateway import isolation
from gateway.isolation import Isolation


async def test_one_at_a_time_at_each_address() -> None:
    turns = Isolation(turn_wait_s=10.0)
    first = await turns.turn("a")
    second = asyncio.create_task(turns.turn("a"))
    with await turns.turn("b"):
        await asyncio.sleep(0)
        assert not second.done()
    first.end()
    first.end()
    third = asyncio.create_task(turns.turn("a"))
    with await second:
        await asyncio.sleep(0)
        assert not third.done(), "a turn that is ended twice lets one in"
    (await third).end()


async def test_who_waits_too_long_goes_without_a_turn() -> None:
    turns = Isolation(turn_wait_s=0.01)
    with await turns.turn("a"):
        async with asyncio.timeout(10):
            without = await turns.turn("a")
        without.end()
        assert turns._locks["a"].locked(), "it ends nobody else's"


async def test_only_addresses_in_use_are_remembered_without_need() -> None:
    turns = Isolation()
    with await turns.turn("held"):
        for number in range(2 * isolation.MAX_IDLE):
            (await turns.turn(f"{number}")).end()
            assert len(turns._locks) <= isolation.MAX_IDLE + 1
        assert turns._locks["held"].locked()

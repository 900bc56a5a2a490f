"""Ending tasks for good, also when two cancellations come one after the other."""

import asyncio

import pytest

from gateway.calls import cancel_and_wait, see_through


async def test_a_second_cancellation_does_not_leave_a_task_behind() -> None:
    may_end, steps = asyncio.Event(), list[str]()

    async def leg() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
            steps.append("leg ended")

    async def handler(task: "asyncio.Task[None]") -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await cancel_and_wait(task)
            steps.append("handler ended")

    running = asyncio.create_task(leg())
    handling = asyncio.create_task(handler(running))
    for _ in range(3):
        await asyncio.sleep(0)
        handling.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await handling
    assert steps == ["leg ended"]
    assert running.cancelled()


async def test_what_is_seen_through_may_fail() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await see_through(fail())

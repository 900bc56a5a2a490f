"""What counts as evidence that a lost worker has died."""

import asyncio

import pytest

from gateway import losses
from gateway.losses import Losses
from tests.fakes.clock import Clock


@pytest.fixture
def known(clock: Clock) -> Losses:
    return Losses(clock)


async def test_a_worker_lost_suddenly_whose_address_refuses_has_died(known: Losses) -> None:
    before = known.of("w")  # a request hears of it first
    known.lost("w", suddenly=True)
    assert known.open("w") and before.ended is None
    known.ended("w")
    assert before.ended is True and known.of("w") is before
    assert not known.open("w")


async def test_silence_is_settled_at_once_and_for_good(known: Losses) -> None:
    before = known.of("w")
    known.lost("w", suddenly=False)
    assert before.ended is False
    known.ended("w")  # somebody killed it and started another
    assert known.of("w").ended is False


async def test_a_worker_that_comes_back_has_not_died(known: Losses) -> None:
    known.lost("w", suddenly=True)
    loss = known.of("w")
    known.heard("w")
    assert loss.ended is False
    assert known.of("w") is not loss, "what happens to it later is another matter"


async def test_a_worker_that_goes_on_after_it_broke_a_request_has_not_died(known: Losses, clock: Clock) -> None:
    loss = known.of("w")
    clock.now += losses.SUDDEN_S / 2
    known.heard("w")  # may have been on its way
    assert loss.ended is None
    clock.now += losses.SUDDEN_S
    known.heard("w")
    assert loss.ended is False


async def test_evidence_that_comes_late_is_none(known: Losses, clock: Clock) -> None:
    known.lost("w", suddenly=True)
    loss = known.of("w")
    clock.now += 2 * losses.OPEN_S
    assert not known.open("w")
    known.ended("w")
    assert loss.ended is False


async def test_waiting_ends_with_the_verdict(known: Losses) -> None:
    known.lost("w", suddenly=True)
    waiting = asyncio.create_task(known.settled(known.of("w"), known.of("w")))
    await asyncio.sleep(0)
    known.ended("w")
    await waiting


async def test_waiting_ends_without_a_verdict_too_and_then_nobody_has_died(known: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "OPEN_S", 0.01)
    known.lost("w", suddenly=True)
    loss = known.of("w")
    async with asyncio.timeout(10):
        await known.settled(loss)
    assert loss.ended is False


async def test_nothing_is_remembered_without_bound(known: Losses) -> None:
    first, second = known.of("s0"), known.of("l0")
    for number in range(losses.MAX_REMEMBERED + 1):
        known.of(f"s{number}")
        known.lost(f"l{number}", suddenly=True)
    assert (first.ended, second.ended) == (False, False)
    assert len(known._lost) == losses.MAX_REMEMBERED and len(known._suspected) <= losses.MAX_REMEMBERED

"""An attempt is executed once: while it runs, and while its ticket is outstanding."""

import asyncio

import pytest

from tandem.attempts import Attempts
from tandem.errors import Reason, TandemError


def refused(attempts: Attempts, request_id: str = "r", attempt: int = 1) -> bool:
    try:
        with attempts.entered(request_id, attempt):
            return False
    except TandemError as error:
        assert error.reason is Reason.ALREADY_EXISTS
        assert error.metadata == {"request_id": request_id, "attempt": str(attempt)}
        return True


async def test_the_same_attempt_is_refused_while_it_runs_and_others_are_not() -> None:
    attempts = Attempts()
    with attempts.entered("r", 1):
        assert refused(attempts)
        assert not refused(attempts, attempt=2)
        assert not refused(attempts, request_id="s")
    assert not refused(attempts)


async def test_an_attempt_that_failed_is_forgotten() -> None:
    attempts = Attempts()
    with pytest.raises(OSError), attempts.entered("r", 1):
        raise OSError
    assert not refused(attempts)


async def test_a_ticket_keeps_its_attempt_until_it_is_over() -> None:
    live = {"ticket"}
    attempts = Attempts(live.__contains__)
    with attempts.entered("r", 1) as attempt:
        attempt.ticket_id = "ticket"
    assert refused(attempts)
    live.clear()
    assert not refused(attempts)
    assert not attempts._ended


async def test_idle_once_the_last_has_left() -> None:
    attempts = Attempts()
    await attempts.wait_idle()
    with attempts.entered("r", 1):
        with attempts.entered("r", 2):
            waiting = asyncio.ensure_future(attempts.wait_idle())
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting

"""Tokens on their way from a Follow call to a completion."""

import pytest

from gateway.followers import Inflow
from gateway.job import Token
from tandem.errors import Reason, TandemError

TOKENS = [[Token(number)] for number in range(4)]


class Taker:
    def __init__(self, wants: int = 100) -> None:
        self.taken: list[int] = []
        self.num_stops = 0
        self.wants = wants
        self.inflow = Inflow(self._take)
        self.inflow.stop = self._stop

    def _take(self, index: int, tokens: list[Token]) -> bool:
        if index != len(self.taken):
            raise TandemError(Reason.INTERNAL, "a gap")
        self.taken += [token.token_id for token in tokens]
        return len(self.taken) < self.wants

    def _stop(self) -> None:
        self.num_stops += 1


async def test_tokens_wait_until_it_is_open_and_keep_their_order():
    taker = Taker()
    taker.inflow.add(0, TOKENS[0])
    taker.inflow.add(1, TOKENS[1])
    assert taker.taken == []
    taker.inflow.open()
    taker.inflow.add(2, TOKENS[2])
    assert (taker.taken, taker.num_stops) == ([0, 1, 2], 0)


async def test_it_stops_once_no_more_is_wanted():
    taker = Taker(wants=2)
    taker.inflow.open()
    taker.inflow.add(0, TOKENS[0])
    assert taker.num_stops == 0
    taker.inflow.add(1, TOKENS[1])
    assert taker.num_stops == 1


async def test_a_failure_is_the_first_one_and_the_end():
    taker = Taker()
    taker.inflow.open()
    taker.inflow.add(1, TOKENS[1])
    taker.inflow.add(0, TOKENS[0])
    taker.inflow.fail(TandemError(Reason.WORKER_LOST, "later"))
    assert taker.inflow.failure is not None and taker.inflow.failure.reason is Reason.INTERNAL
    assert (taker.taken, taker.num_stops) == ([], 1)
    with pytest.raises(TandemError, match="a gap"):
        await taker.inflow.until(lambda: False)


async def test_tokens_that_never_come_are_an_error(monkeypatch):
    monkeypatch.setattr("gateway.followers.TOKENS_UNDER_WAY_S", 0.001)
    with pytest.raises(TandemError) as raised:
        await Taker().inflow.until(lambda: False)
    assert raised.value.reason is Reason.INTERNAL

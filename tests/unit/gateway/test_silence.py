"""Who is silent for too long, by a clock that the tests move."""

from collections.abc import Callable
from typing import Any

import pytest

from gateway.silence import Silence


class FakeLoop:
    """Time and timers of an event loop. `pass_s` moves on in small steps, `stand_still` at once, as a stopped process does."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., None], *arguments: Any) -> "FakeTimer":
        timer = FakeTimer(when, callback, arguments)
        self.timers.append(timer)
        return timer

    def pass_s(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.stand_still(0.05)

    def stand_still(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer.when > self.now]
        for timer in due:
            if not timer.cancelled:
                timer.callback(*timer.arguments)


class FakeTimer:
    def __init__(self, when: float, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.when = when
        self.callback = callback
        self.arguments = arguments
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def ends() -> list[float]:
    return []


@pytest.fixture
def silence(loop: FakeLoop, ends: list[float]) -> Silence:
    return Silence(2.0, lambda: ends.append(loop.now), loop)  # type: ignore[arg-type]


def test_who_says_nothing_is_given_up_after_the_limit(silence: Silence, loop: FakeLoop, ends: list[float]) -> None:
    loop.pass_s(1.9)
    assert not silence.too_long and not ends
    loop.pass_s(0.2)
    assert silence.too_long
    loop.pass_s(10.0)
    assert ends == [pytest.approx(102.0, abs=0.06)]


def test_each_word_gives_it_the_whole_limit_anew_with_one_timer(silence: Silence, loop: FakeLoop, ends: list[float]) -> None:
    for _ in range(30):
        loop.pass_s(0.5)
        silence.heard()
        assert len(loop.timers) == 1
    assert not ends
    last = loop.now
    loop.pass_s(3.0)
    assert ends == [pytest.approx(last + 2.0, abs=0.06)]


def test_a_process_that_stood_still_itself_listens_as_long_again(silence: Silence, loop: FakeLoop, ends: list[float]) -> None:
    loop.pass_s(1.0)
    loop.stand_still(60.0)
    assert not ends
    loop.pass_s(1.9)
    assert not ends
    loop.pass_s(0.2)
    assert silence.too_long


def test_nothing_is_called_once_closed(silence: Silence, loop: FakeLoop, ends: list[float]) -> None:
    silence.close()
    silence.close()
    loop.pass_s(5.0)
    assert not ends and not silence.too_long

"""When work counts as stalled: long steps that move on do not, and what stands still does within five seconds."""

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import progress
from tandem.engine_thread import EngineThread
from tandem.progress import INTERVAL_S, LONGEST_LIMIT_S, SHORTEST_LIMIT_S, ProgressWatch, StallJudge, Work


def stalls_after_s(judge: StallJudge, work: Work, most_s: float = 10.0) -> float | None:
    """For how long the work may stand still."""
    passed_s = 0.0
    while passed_s < most_s:
        if judge.observe({"engine": work}, INTERVAL_S):
            return passed_s
        passed_s += INTERVAL_S
    return None


def test_what_stands_still_is_stalled_after_the_shortest_limit() -> None:
    assert stalls_after_s(StallJudge(), Work(True, 0)) == SHORTEST_LIMIT_S


def test_what_waits_for_nothing_is_never_stalled() -> None:
    assert stalls_after_s(StallJudge(), Work(False, 0)) is None


def test_it_recovers_with_the_first_advance() -> None:
    judge = StallJudge()
    stalls_after_s(judge, Work(True, 0))
    assert judge.observe({"engine": Work(True, 0)}, INTERVAL_S)
    assert not judge.observe({"engine": Work(True, 1)}, INTERVAL_S)


def test_one_kind_does_not_hide_another() -> None:
    judge = StallJudge()
    for count in range(20):
        stalled = judge.observe({"engine": Work(True, count), "admission": Work(True, 7)}, INTERVAL_S)
    assert list(stalled) == ["admission"]


def test_what_others_may_hold_up_is_excused_for_as_long() -> None:
    assert stalls_after_s(StallJudge(), Work(True, 0, excused_s=6.0)) == 6.0


def test_work_that_has_shown_long_pauses_is_given_more_time() -> None:
    judge = StallJudge()
    for _ in range(4):
        judge.observe({"engine": Work(True, 0)}, INTERVAL_S)
    limit_s = stalls_after_s(judge, Work(True, 1))
    assert limit_s == 4 * 3 * INTERVAL_S > SHORTEST_LIMIT_S


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.0, 2 * INTERVAL_S)), max_size=200))
def test_whatever_came_before_a_stall_is_called_one_within_five_seconds(history: list[tuple[bool, bool, float]]) -> None:
    judge, count = StallJudge(), 0
    for waiting, advances, elapsed_s in history:
        count += advances
        stalled = judge.observe({"engine": Work(waiting, count)}, elapsed_s)
        assert not (stalled and (advances or not waiting))
    limit_s = stalls_after_s(judge, Work(True, count + 1))
    assert limit_s is not None and SHORTEST_LIMIT_S <= limit_s <= LONGEST_LIMIT_S + INTERVAL_S < 5.0


async def test_the_watch_tells_each_change_of_its_verdict_once() -> None:
    work, told = [Work(True, 0)], list[bool]()
    watch = ProgressWatch(lambda: {"engine": work[0]}, told.append)
    for _ in range(20):
        watch.look(INTERVAL_S)
    work[0] = Work(True, 1)
    watch.look(INTERVAL_S)
    watch.look(INTERVAL_S)
    assert told == [False, True]


async def test_the_watch_tells_of_what_stands_still_for_good() -> None:
    work, told = [Work(True, 0)], list[str]()
    watch = ProgressWatch(lambda: {"engine": work[0]}, lambda healthy: None, told.append, wedged_s=10.0)
    for _ in range(round(9.5 / INTERVAL_S)):
        watch.look(INTERVAL_S)
    work[0] = Work(True, 1)
    for _ in range(round(10 / INTERVAL_S)):
        watch.look(INTERVAL_S)
    assert not told, "it had moved on"
    watch.look(INTERVAL_S)
    assert told == ["no progress: engine for 10.0 s"]


async def test_a_process_that_stood_still_itself_has_not_seen_its_work_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, looked = list[float](), asyncio.Event()

    def look(elapsed_s: float) -> None:
        looks.append(elapsed_s)
        looked.set()

    monkeypatch.setattr(progress, "INTERVAL_S", 0.001)
    watch = ProgressWatch(dict, lambda healthy: None)
    monkeypatch.setattr(watch, "look", look)
    watch.start()
    await asyncio.sleep(0)
    time.sleep(0.05)  # noqa: ASYNC251 - the loop stands still
    await looked.wait()
    await watch.close()
    assert max(looks) <= 0.002


async def test_a_watch_that_is_closed_has_ended() -> None:
    watch = ProgressWatch(dict, lambda healthy: None)
    watch.start()
    await watch.close()
    assert len(asyncio.all_tasks()) == 1


def test_an_engine_thread_is_at_work_exactly_while_it_steps() -> None:
    stepping, leave, rested = threading.Event(), threading.Event(), threading.Event()
    steps = iter([True, False])

    def step() -> bool:
        stepping.set()
        leave.wait(10)
        return next(steps, False)

    thread = EngineThread("test", lambda: None, step, lambda error: None)
    assert not thread.work().waiting
    thread.start()
    assert stepping.wait(10)
    first = thread.work()
    assert first.waiting and first == thread.work()
    thread.beat()
    assert thread.work().num_advances == first.num_advances + 1
    leave.set()
    while thread.work().waiting:
        rested.wait(0.001)
    assert thread.work().num_advances == first.num_advances + 2
    assert thread.stop(10)

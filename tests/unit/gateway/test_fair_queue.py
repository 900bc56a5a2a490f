"""Fairness between sizes, and how quickly a queue drains: pure policy."""

from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.drain_rate import FEWEST_MOMENTS, DrainRate
from gateway.fair_queue import FairQueue, Waiting

T = TypeVar("T")


def pop(queue: FairQueue[T]) -> Waiting[T]:
    head = queue.heads()[0]
    queue.take(head)
    return head


def test_equal_sizes_come_in_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(5):
        queue.push(Waiting(10, number))
    assert [pop(queue).item for _ in range(5)] == [0, 1, 2, 3, 4]
    assert queue.heads() == []


def test_a_flood_of_long_prompts_delays_a_short_one_by_one_of_them_at_most() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push(Waiting(8000, "long"))
    pop(queue)
    queue.push(Waiting(100, "short"))
    assert "short" in [pop(queue).item for _ in range(2)]


def test_those_who_pass_another_class_do_not_cost_it_its_turn() -> None:
    """Whose turn it is may have to wait for something that others need not."""
    queue: FairQueue[str] = FairQueue()
    queue.push(Waiting(8000, "long"))
    for _ in range(100):
        queue.push(Waiting(100, "short"))
    for _ in range(90):
        queue.take(next(head for head in queue.heads() if head.item == "short"))
    queue.push(Waiting(1, "new"))
    assert queue.heads()[0].item == "long"
    assert [pop(queue).item for _ in range(3)].count("new") == 1


def test_a_flood_of_short_prompts_does_not_starve_a_long_one() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push(Waiting(8000, "long"))
    for _ in range(1000):
        queue.push(Waiting(100, "short"))
    order = [pop(queue).item for _ in range(1001)]
    assert order.index("long") <= 80


def test_a_size_that_was_not_wanted_for_long_gets_no_more_than_its_share() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.push(Waiting(8000, "long"))
    for _ in range(20):
        pop(queue)
    for _ in range(500):
        queue.push(Waiting(100, "short"))
    order = [pop(queue).item for _ in range(200)]
    assert order.count("long") >= 2


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 10_000)), max_size=200))
def test_nobody_is_lost_or_served_twice(steps: list[tuple[str, int]]) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: list[Waiting[int]] = []
    for step, number in steps:
        if step == "push":
            waiting.append(Waiting(number, number))
            queue.push(waiting[-1])
        elif step == "pop" and waiting:
            first = pop(queue)
            waiting.remove(first)
        elif waiting:
            leaving = waiting.pop(number % len(waiting))
            assert queue.remove(leaving)
            assert not queue.remove(leaving)
        assert queue.num_waiting == len(waiting)
        assert queue.num_tokens == sum(each.num_tokens for each in waiting)
    assert {id(pop(queue)) for _ in range(len(waiting))} == {id(each) for each in waiting}


@given(st.lists(st.integers(1, 10_000), max_size=100), st.integers(1, 10_000))
def test_a_newcomer_has_no_more_before_it_than_wait(sizes: list[int], newcomer: int) -> None:
    queue: FairQueue[int] = FairQueue()
    for size in sizes:
        queue.push(Waiting(size, size))
    mine = Waiting(newcomer, -1)
    number, tokens = queue.ahead_of(mine)
    same = [size for size in sizes if Waiting(size, 0).size_class == mine.size_class]
    assert len(same) <= number <= len(sizes)
    assert sum(same) <= tokens <= sum(sizes)


def test_the_drain_rate_is_what_was_measured() -> None:
    rate = DrainRate()
    rate.began(100.0)
    for number in range(1, FEWEST_MOMENTS - 1):
        rate.gave(100.0 + number)
    assert rate.wait_s(0, 102.0) is None
    for number in range(FEWEST_MOMENTS - 1, 200):
        rate.gave(100.0 + number)
    assert rate.wait_s(0, 299.0) == pytest.approx(1.0)
    assert rate.wait_s(9, 299.0) == pytest.approx(10.0)
    assert rate.wait_s(0, 299.0 + 31.0) == pytest.approx(2.0)  # it has come to a halt
    rate.began(1000.0)
    assert rate.wait_s(0, 1000.0) == pytest.approx(1.0), "as it was the last time"
    for number in range(FEWEST_MOMENTS):
        rate.gave(1000.0 + number / 10)
    assert rate.wait_s(0, 1000.3) == pytest.approx(0.3 / FEWEST_MOMENTS)

"""Admission: bounded, in order, and safe against cancelling."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import PREFILL_AHEAD_S, Admission, AdmissionLimits, Size
from gateway.capacity import Capacity
from tandem.errors import Reason, TandemError
from tests.fakes.clock import Clock

FOREVER = float("inf")


class Client:
    """A request that holds its place until told to leave."""

    def __init__(self, admission: Admission, num_tokens: int = 1) -> None:
        self.leave = asyncio.Event()
        self.inside = False
        self.prefilled: Callable[[], None] = lambda: None
        self.task = asyncio.create_task(self._stay(admission, num_tokens))

    async def _stay(self, admission: Admission, num_tokens: int) -> None:
        async with admission.place(Size(num_tokens, 1), FOREVER) as self.prefilled:
            self.inside = True
            try:
                await self.leave.wait()
            finally:
                self.inside = False


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def admission() -> AsyncIterator[Admission]:
    yield Admission(AdmissionLimits(max_running=2, max_queued=3, max_queued_tokens=100))


async def test_places_are_given_in_order(admission: Admission) -> None:
    clients = [Client(admission) for _ in range(5)]
    await settle()
    assert [client.inside for client in clients] == [True, True, False, False, False]
    assert (admission.num_running, admission.num_queued) == (2, 3)
    clients[1].leave.set()
    await settle()
    assert [client.inside for client in clients] == [True, False, True, False, False]
    for client in clients:
        client.leave.set()
    await admission.wait_idle()
    assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_a_full_queue_refuses_at_once(admission: Admission) -> None:
    clients = [Client(admission) for _ in range(5)]
    await settle()
    with pytest.raises(TandemError) as raised:
        async with admission.place(Size(1), FOREVER):
            pass
    assert raised.value.reason is Reason.QUEUE_FULL
    for client in clients:
        client.task.cancel()
    await admission.wait_idle()


async def test_waiting_tokens_are_bounded_but_running_ones_are_not(admission: Admission) -> None:
    clients = [Client(admission, 1000), Client(admission, 1000), Client(admission, 60)]
    await settle()
    with pytest.raises(TandemError):
        admission.check(41)
    admission.check(40)
    for client in clients:
        client.task.cancel()
    await admission.wait_idle()


async def test_a_passed_deadline_is_refused() -> None:
    admission = Admission(AdmissionLimits(1, 1, 1), clock=lambda: 100.0)
    with pytest.raises(TandemError) as raised:
        async with admission.place(Size(1), 100.0):
            pass
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_place_given_to_a_cancelled_waiter_goes_on(admission: Admission) -> None:
    clients = [Client(admission) for _ in range(4)]
    await settle()
    clients[2].task.cancel()  # cancelled, and in the same turn of the loop its place becomes free
    clients[0].leave.set()
    await settle()
    assert [client.inside for client in clients] == [False, True, False, True]
    clients[1].leave.set()
    clients[3].leave.set()
    await admission.wait_idle()


async def test_a_waiter_cancelled_after_its_turn_came_hands_it_on(admission: Admission) -> None:
    clients = [Client(admission) for _ in range(4)]
    await settle()
    clients[0].leave.set()
    await asyncio.sleep(0)  # the leaving client has given its place to the third, which has not run yet
    clients[2].task.cancel()
    await settle()
    assert admission.num_running == 2
    assert clients[3].inside
    for client in clients:
        client.leave.set()
    await admission.wait_idle()


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel"]), st.integers(0, 9), st.integers(0, 2)), max_size=60))
@settings(deadline=None, max_examples=50)
def test_places_are_never_lost(steps: list[tuple[str, int, int]]) -> None:
    asyncio.run(_random_walk(steps))


async def _random_walk(steps: list[tuple[str, int, int]]) -> None:
    admission = Admission(AdmissionLimits(max_running=2, max_queued=50, max_queued_tokens=1000))
    clients: list[Client] = []
    for step, number, turns in steps:
        if step == "enter" or not clients:
            clients.append(Client(admission))
        elif step == "leave":
            clients[number % len(clients)].leave.set()
        else:
            clients[number % len(clients)].task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        assert admission.num_running <= 2
    await settle()
    assert sum(client.inside for client in clients) == admission.num_running
    assert admission.num_queued == 0 or admission.num_running == 2
    for client in clients:
        client.leave.set()
    await admission.wait_idle()
    assert admission.num_running == 0
    await asyncio.gather(*(client.task for client in clients), return_exceptions=True)


async def drained(admission: Admission, clock: Clock, num_waiting: int) -> list[Client]:
    """One place, which has changed hands every second for a while, and `num_waiting` that still wait."""
    clients = [Client(admission) for _ in range(num_waiting + 12)]
    await settle()
    for client in clients[:11]:
        clock.now += 1.0
        client.leave.set()
        await settle()
    assert admission.num_queued == num_waiting
    return clients


def steady(clock: Clock, max_wait_s: float = 10.0) -> Admission:
    return Admission(AdmissionLimits(1, 100, 10_000, max_wait_s), clock)


async def refusal(admission: Admission, deadline: float) -> TandemError:
    with pytest.raises(TandemError) as raised:
        async with admission.place(Size(1), deadline):
            pass
    return raised.value


async def test_a_deadline_that_waiting_would_use_up_is_refused_at_once() -> None:
    clock = Clock(0.0)
    admission = steady(clock)
    clients = await drained(admission, clock, 4)
    assert (await refusal(admission, clock.now + 9.0)).reason is Reason.DEADLINE_EXCEEDED
    patient = asyncio.create_task(refusal(admission, clock.now + 20.0))
    await settle()
    assert admission.num_queued == 5  # it waits
    patient.cancel()
    await leave(clients, admission)


async def test_after_a_burst_the_prefill_workers_speed_tells_how_long_a_wait_will_be() -> None:
    """No place has changed hands yet. They compute 10 tokens a second, and 10 are work for the second that they are given ahead."""
    admission = Admission(AdmissionLimits(100, 100, 10_000), Clock(0.0), lambda: Capacity(100, 10_000, prefill_tokens_per_s=10.0))
    clients = [Client(admission) for _ in range(31)]
    await settle()
    assert (admission.num_running, admission.num_queued) == (11, 20)
    error = await refusal(admission, deadline=6.1)  # 31 tokens are before it
    assert error.reason is Reason.DEADLINE_EXCEEDED
    assert error.retry_after_s == pytest.approx(2.1)
    patient = asyncio.create_task(refusal(admission, deadline=6.5))
    await settle()
    assert admission.num_queued == 21
    patient.cancel()
    await leave(clients, admission)


async def test_a_wait_that_is_too_long_is_refused_with_the_time_that_it_takes_to_drain() -> None:
    clock = Clock(0.0)
    admission = steady(clock, max_wait_s=5.0)
    clients = await drained(admission, clock, 8)
    error = await refusal(admission, FOREVER)
    assert error.reason is Reason.QUEUE_FULL
    assert error.retry_after_s == pytest.approx(9.0, rel=0.1)
    await leave(clients, admission)


async def test_what_has_expired_in_the_queue_never_begins() -> None:
    clock = Clock(0.0)
    admission = steady(clock)
    first = Client(admission)
    await settle()
    late = asyncio.create_task(refusal(admission, 5.0))
    await settle()
    clock.now = 6.0
    first.leave.set()
    assert (await late).reason is Reason.DEADLINE_EXCEEDED
    assert admission.num_running == 0


async def test_no_more_run_than_the_decode_workers_hold() -> None:
    capacity: list[Capacity | None] = [Capacity(num_requests=3, num_tokens=1000)]
    admission = Admission(AdmissionLimits(100, 100, 100_000), capacity=lambda: capacity[0])
    clients = [Client(admission, 10) for _ in range(5)]
    await settle()
    assert admission.num_running == 3
    capacity[0] = Capacity(num_requests=4, num_tokens=1000)
    admission.capacity_changed()
    await settle()
    assert admission.num_running == 4
    await leave(clients, admission)


async def test_tokens_count_too_but_one_request_always_runs() -> None:
    admission = Admission(AdmissionLimits(100, 100, 100_000), capacity=lambda: Capacity(num_requests=50, num_tokens=1000))
    clients = [Client(admission, 5000), Client(admission, 400), Client(admission, 400)]
    await settle()
    assert [client.inside for client in clients] == [True, False, False]
    clients[0].leave.set()
    await settle()
    assert [client.inside for client in clients] == [False, True, True]
    await leave(clients, admission)


async def test_completions_are_taken_to_be_as_long_as_they_were() -> None:
    admission = Admission(AdmissionLimits(100, 100, 100_000), capacity=lambda: Capacity(num_requests=50, num_tokens=1000))
    for _ in range(200):
        admission.completed(900)
    clients = []
    async with admission.place(Size(1, 2000), FOREVER):
        clients.append(Client(admission, 100))
        await settle()
        assert admission.num_queued == 1
    await leave(clients, admission)


def prefill_bound(tokens_per_s: float) -> Admission:
    capacity = Capacity(num_requests=100, num_tokens=100_000, prefill_tokens_per_s=tokens_per_s)
    return Admission(AdmissionLimits(100, 100, 100_000), capacity=lambda: capacity)


async def test_prefill_workers_get_no_more_work_ahead_than_for_a_second() -> None:
    """Or all would wait there until their deadlines have passed."""
    admission = prefill_bound(1000 / PREFILL_AHEAD_S)
    clients = [Client(admission, 300) for _ in range(8)]
    await settle()
    assert (admission.num_running, admission.num_queued) == (4, 4)
    clients[0].prefilled()
    clients[0].prefilled()
    await settle()
    assert (admission.num_running, admission.num_queued) == (5, 3)
    clients[1].leave.set()
    await settle()
    assert (admission.num_running, admission.num_queued) == (5, 2)
    await leave(clients, admission)


async def test_a_short_prompt_passes_long_ones_that_wait_for_prefill_workers() -> None:
    admission = prefill_bound(1000 / PREFILL_AHEAD_S)
    longs = [Client(admission, 8000) for _ in range(3)]
    await settle()
    shorts = [Client(admission, 200) for _ in range(8)]
    await settle()
    assert [client.inside for client in longs] == [True, False, False], "there is always room for one"
    assert sum(client.inside for client in shorts) == 6
    for client in (longs[0], *shorts[:3]):
        client.prefilled()
    await settle()
    assert longs[1].inside, "its turn has come, however many short ones wait"
    await leave([*longs, *shorts], admission)


async def leave(clients: list[Client], admission: Admission) -> None:
    for client in clients:
        client.leave.set()
    await admission.wait_idle()

"""The status stream's pace and content, with a pause that the test controls; spans by trace id."""

import asyncio
import threading
from dataclasses import replace

import pytest
from opentelemetry import trace

from tandem.api.v1 import operations_pb2
from tandem.errors import Reason, TandemError
from tandem.interceptor import CallCounts
from tandem.status import SERVICE_NAME, StatusServicer, WorkerIdentity, WorkerSnapshot
from tandem.tracing import configure_tracing, tracer
from tandem.worker.v1 import kv_pb2, status_pb2

IDENTITY = WorkerIdentity(
    worker_id="w",
    role=operations_pb2.WORKER_ROLE_PREFILL,
    model_digest="m",
    tokenizer_digest="t",
    layout=kv_pb2.KvLayout(num_layers=2),
    device="cpu",
    weight_format="float32",
    transports=("shm", "tcp"),
)
SNAPSHOT = WorkerSnapshot(
    role=operations_pb2.WORKER_ROLE_PREFILL,
    condition=operations_pb2.WORKER_CONDITION_SERVING,
    queued_requests=1,
    queued_tokens=2,
    running_requests=3,
    max_requests=4,
    total_blocks=5,
    free_blocks=6,
    tokens_per_second=7.5,
    requests=CallCounts(received=5, ok=2, rejected=1),
    handoff=operations_pb2.HandoffCounts(tickets=operations_pb2.TicketCounts(granted=3)),
)


class Worker:
    """A worker whose state and pauses the test sets; a pause lasts until `go` is set."""

    def __init__(self, maximum_interval_s: float = 60.0) -> None:
        self.snapshot = SNAPSHOT
        self.go = asyncio.Event()
        self.pauses: list[float] = []
        self.servicer = StatusServicer(
            IDENTITY, lambda: self.snapshot, minimum_interval_s=0.0, maximum_interval_s=maximum_interval_s, sleep=self.pause
        )

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await self.go.wait()

    def watch(self):
        return self.servicer.Watch(status_pb2.WatchRequest(), None)

    def change(self, free_blocks: int) -> None:
        self.snapshot = replace(self.snapshot, free_blocks=free_blocks)
        self.servicer.changed()


async def test_first_state_comes_at_once_and_complete():
    states = Worker().watch()
    assert await anext(states) == status_pb2.WatchResponse(
        sequence_number=1,
        worker_id="w",
        role=operations_pb2.WORKER_ROLE_PREFILL,
        ready=True,
        model_digest="m",
        tokenizer_digest="t",
        layout=kv_pb2.KvLayout(num_layers=2),
        device="cpu",
        weight_format="float32",
        total_blocks=5,
        free_blocks=6,
        queued_requests=1,
        queued_tokens=2,
        running_requests=3,
        max_requests=4,
        tokens_per_second=7.5,
        transports=["shm", "tcp"],
        condition=operations_pb2.WORKER_CONDITION_SERVING,
        requests=operations_pb2.RequestCounts(received=5, ok=2, rejected=1),
        handoff=operations_pb2.HandoffCounts(tickets=operations_pb2.TicketCounts(granted=3)),
    )
    await states.aclose()


async def test_changes_during_the_pause_come_as_one_state():
    worker = Worker()
    states = worker.watch()
    await anext(states)
    following = asyncio.ensure_future(anext(states))
    await turns()
    for free_blocks in (4, 3, 2):
        worker.change(free_blocks)
    await turns()
    assert not following.done()
    worker.go.set()
    state = await following
    assert (state.sequence_number, state.free_blocks) == (2, 2)
    await states.aclose()


async def test_without_a_change_a_state_comes_after_the_longest_interval():
    worker = Worker(maximum_interval_s=0.01)
    worker.go.set()
    states = worker.watch()
    assert [(await anext(states)).sequence_number for _ in range(3)] == [1, 2, 3]
    await states.aclose()


async def test_a_change_reported_by_another_thread_wakes_every_watcher():
    worker = Worker()
    worker.go.set()
    watchers = [worker.watch() for _ in range(3)]
    assert [(await anext(states)).sequence_number for states in watchers] == [1, 2, 3]
    following = [asyncio.ensure_future(anext(states)) for states in watchers]
    await turns()
    thread = threading.Thread(target=worker.change, args=(1,))
    thread.start()
    thread.join()
    assert sorted([(await each).sequence_number for each in following]) == [4, 5, 6]
    for states in watchers:
        await states.aclose()


def num_wakes(worker, monkeypatch):
    """That a hundred changes cost the loop."""
    wakes = []
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", wakes.append)
        for _ in range(100):
            worker.servicer.changed()
    return len(wakes)


async def test_many_changes_cost_the_loop_one_wake_up_and_none_before_somebody_waits(monkeypatch):
    worker = Worker()
    states = worker.watch()
    await anext(states)
    following = asyncio.ensure_future(anext(states))
    await turns()
    assert num_wakes(worker, monkeypatch) == 0
    worker.go.set()
    assert (await following).sequence_number == 2
    waiting = asyncio.ensure_future(anext(states))
    await turns()
    assert num_wakes(worker, monkeypatch) == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert num_wakes(worker, monkeypatch) == 0
    await states.aclose()


def test_a_change_before_anybody_watches_is_fine():
    StatusServicer(IDENTITY, lambda: SNAPSHOT).changed()


async def test_spans_of_a_trace():
    configure_tracing("tandem.test")
    span = tracer().start_span("prefill.run")
    span.end()
    request = status_pb2.GetSpansRequest(trace_id=trace.format_trace_id(span.get_span_context().trace_id))
    response = await StatusServicer(IDENTITY, lambda: SNAPSHOT).GetSpans(request, None)
    assert [each.name for each in response.spans] == ["prefill.run"]


@pytest.mark.parametrize("trace_id", ["", "0" * 31, "A" * 32, "0x" + "0" * 30, "é" * 32, "0" * 32 + "\n"])
async def test_malformed_trace_ids_are_refused(trace_id):
    with pytest.raises(TandemError) as caught:
        await StatusServicer(IDENTITY, lambda: SNAPSHOT).GetSpans(status_pb2.GetSpansRequest(trace_id=trace_id), None)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.violations[0].field == "trace_id"


def test_service_name_is_the_protos():
    assert SERVICE_NAME == "tandem.worker.v1.WorkerStatusService"


async def turns() -> None:
    """Lets everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)

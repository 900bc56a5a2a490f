"""What a worker says of its load while it changes, how it leaves, and what it gives back when others leave."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason, from_rpc_error
from tandem.tracing import configure_tracing, recent_spans
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, status_pb2, status_pb2_grpc
from tandem.worker_settings import TransferSettings
from tests.fakes.runner import completion
from tests.service.workers.harness import (
    Node,
    Pair,
    decode_request,
    generate,
    held,
    node,
    open_decode,
    open_prefill,
    pair,
    prefill_request,
)

PROMPT = [(13 * index + 2) % 251 for index in range(41)]
LEASE_S = 60.0
State = status_pb2.WatchResponse


@asynccontextmanager
async def watching(at: Node) -> AsyncIterator[Callable[[Callable[[State], bool]], object]]:
    """Yields a function that waits for a state. States come only when the worker says that something has changed."""
    at.worker._status._maximum_interval_s = 600.0
    call = status_pb2_grpc.WorkerStatusServiceStub(at.channel).Watch(status_pb2.WatchRequest())
    await call.read()

    async def until(holds: Callable[[State], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds(await call.read()):
                pass

    yield until
    call.cancel()


async def test_a_prefill_worker_tells_of_its_load_as_it_changes() -> None:
    async with node("prefill", num_blocks=16) as at, watching(at) as until:
        with held(at) as entered:
            first = open_prefill(at, prefill_request(PROMPT, first_token_only=True))
            await first.read()
            await entered()
            await until(lambda state: (state.free_blocks, state.running_requests, state.queued_tokens) == (5, 1, 41))
            second = open_prefill(at, prefill_request(PROMPT, first_token_only=True))
            reading = asyncio.create_task(second.read())
            await until(lambda state: (state.queued_requests, state.queued_tokens) == (1, 82))
        await reading
        await until(lambda state: (state.free_blocks, state.running_requests, state.queued_tokens) == (16, 0, 0))


async def test_a_decode_worker_tells_of_its_load_as_it_changes() -> None:
    async with pair() as nodes, watching(nodes.decode) as until:
        request = prefill_request(PROMPT, max_tokens=20)
        with held(nodes.decode):
            with held(nodes.prefill):
                prefill = open_prefill(nodes.prefill, request)
                admitted = (await prefill.read()).admitted
                decode = asyncio.create_task(_decoded(nodes, decode_request(admitted, request)))
                await until(lambda state: (state.free_blocks, state.queued_requests) == (53, 1))
            await until(lambda state: (state.queued_requests, state.running_requests) == (0, 1))
        assert await decode == completion(PROMPT, 20)[1:]
        await until(lambda state: (state.free_blocks, state.running_requests) == (64, 0))


async def test_a_prompt_that_waits_for_blocks_is_served_before_the_worker_leaves() -> None:
    """Its blocks come from a prompt whose ticket is pulled only after the shutdown has begun."""
    async with node("decode") as decode, node("prefill", num_blocks=16, grace_s=10.0) as prefill:
        nodes = Pair(prefill, decode)
        first, second = prefill_request(PROMPT), prefill_request(PROMPT[::-1])
        call = open_prefill(prefill, first)
        admitted = await _prefilled(call)
        waiting = open_prefill(prefill, second)
        reading = asyncio.create_task(waiting.read())
        await prefill.until(lambda load: load.num_waiting == 1)
        prefill.worker.stop()
        assert await _decoded(nodes, decode_request(admitted, first)) == completion(PROMPT, 8)[1:]
        assert await _decoded(nodes, decode_request((await reading).admitted, second)) == completion(PROMPT[::-1], 8)[1:]


async def test_a_stream_in_flight_is_finished_before_a_decode_worker_leaves() -> None:
    async with node("prefill") as prefill, node("decode", grace_s=10.0) as decode:
        request = prefill_request(PROMPT, max_tokens=20)
        with held(decode) as entered:
            admitted = await _prefilled(open_prefill(prefill, request))
            tokens = asyncio.create_task(_decoded(Pair(prefill, decode), decode_request(admitted, request)))
            await entered()
            decode.worker.stop()
        assert await tokens == completion(PROMPT, 20)[1:]
        await decode.wait_idle()


async def test_a_stream_that_takes_longer_than_a_leaving_worker_waits_can_go_on_elsewhere() -> None:
    """Watchers hear of the leaving worker until the last of its streams has ended."""
    async with node("prefill") as prefill, node("decode", grace_s=0.2) as decode:
        request = prefill_request(PROMPT, max_tokens=200)
        admitted = await _prefilled(open_prefill(prefill, request))
        states = status_pb2_grpc.WorkerStatusServiceStub(decode.channel).Watch(status_pb2.WatchRequest())
        with held(decode) as entered:
            call = open_decode(decode, decode_request(admitted, request))
            await entered()
            decode.worker.stop()
            while (await states.read()).condition != operations_pb2.WORKER_CONDITION_DRAINING:
                pass
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [event async for event in call]
        assert from_rpc_error(caught.value).reason is Reason.DRAINING
        await decode.wait_idle()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_a_worker_whose_engine_hangs_is_not_ready_until_it_moves_on(kind: str) -> None:
    async with pair() as nodes:
        at: Node = getattr(nodes, kind)
        with held(at) as entered:
            answering = asyncio.create_task(generate(nodes, prefill_request(PROMPT)))
            await entered()
            for _ in range(5):
                at.worker._progress.look(1.0)
            assert (await _ready(at), await _condition(at)) == (2, operations_pb2.WORKER_CONDITION_STALLED)
        assert (await answering)[0] == completion(PROMPT, 8)
        at.worker._progress.look(1.0)
        assert (await _ready(at), await _condition(at)) == (1, operations_pb2.WORKER_CONDITION_SERVING)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("leaving", [False, True])
async def test_a_worker_whose_engine_hangs_for_good_ends_itself(kind: str, leaving: bool) -> None:
    """Unless it is about to leave anyway."""
    async with pair() as nodes:
        at: Node = getattr(nodes, kind)
        told: list[str] = []
        at.worker._leave = told.append
        with held(at) as entered:
            answering = asyncio.create_task(generate(nodes, prefill_request(PROMPT)))
            await entered()
            if leaving:
                at.worker.stop()
            for _ in range(30):
                at.worker._progress.look(1.0)
                assert not told
            at.worker._progress.look(1.0)
            assert len(told) == (not leaving)
        assert (await answering)[0] == completion(PROMPT, 8)


async def test_prompts_that_wait_for_blocks_longer_than_a_lease_make_a_worker_not_ready() -> None:
    async with node("prefill", num_blocks=11, transfer=TransferSettings(lease_s=LEASE_S)) as at:
        await _prefilled(open_prefill(at, prefill_request(PROMPT)))
        waiting = open_prefill(at, prefill_request(PROMPT))
        await at.until(lambda load: load.num_waiting == 1)
        at.worker._progress.look(1.0)
        for _ in range(2):
            at.worker._progress.look(LEASE_S / 2)
        assert await _condition(at) == operations_pb2.WORKER_CONDITION_SERVING
        at.worker._progress.look(1.0)
        assert await _condition(at) == operations_pb2.WORKER_CONDITION_STALLED
        waiting.cancel()
        await at.until(lambda load: load.num_waiting == 0)
        at.worker._progress.look(1.0)
        assert await _condition(at) == operations_pb2.WORKER_CONDITION_SERVING


async def test_the_spans_of_a_request_follow_each_other_in_its_trace() -> None:
    configure_tracing("tandem.test")
    trace_id = uuid.uuid4().hex
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    async with pair() as nodes:
        request = prefill_request(PROMPT)
        call = prefill_pb2_grpc.PrefillServiceStub(nodes.prefill.channel).Prefill(request, metadata=metadata)
        wanted = decode_request(await _prefilled(call), request)
        async for _ in decode_pb2_grpc.DecodeServiceStub(nodes.decode.channel).Decode(wanted, metadata=metadata):
            pass
    spans = {span.name: (span.start_time.ToNanoseconds(), span.end_time.ToNanoseconds()) for span in recent_spans(trace_id)}
    assert set(spans) == {"prefill.queue", "prefill.run", "kv.wait", "kv.pull", "decode.queue", "decode.run"}
    assert all(start <= end for start, end in spans.values())
    for former, latter in (
        ("prefill.queue", "prefill.run"),
        ("kv.wait", "kv.pull"),
        ("kv.pull", "decode.queue"),
        ("decode.queue", "decode.run"),
    ):
        # Each moment is turned into wall-clock time by itself, microseconds apart.
        assert abs(spans[former][1] - spans[latter][0]) < 20_000_000


async def test_a_cancelled_pull_gives_its_ticket_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease would last 30 s."""
    async with pair() as nodes:
        began, puller = asyncio.Event(), nodes.decode.worker._puller

        async def pull(*_: object) -> None:
            began.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(puller, "pull", pull)
        request = prefill_request(PROMPT)
        prefill = open_prefill(nodes.prefill, request)
        admitted = await _prefilled(prefill)
        decode = open_decode(nodes.decode, decode_request(admitted, request))
        await began.wait()
        decode.cancel()
        await nodes.prefill.wait_idle()
        await nodes.decode.wait_idle()


async def _ready(at: Node) -> int:
    name = "prefill.ready" if at.worker._server._name == "prefill" else "decode.ready"
    return int((await HealthStub(at.channel).Check(health_pb2.HealthCheckRequest(service=name))).status)


async def _condition(at: Node) -> int:
    return int((await _state(at)).condition)


async def _state(at: Node) -> State:
    call = status_pb2_grpc.WorkerStatusServiceStub(at.channel).Watch(status_pb2.WatchRequest())
    state = await call.read()
    call.cancel()
    return state


async def _prefilled(call: grpc.aio.UnaryStreamCall) -> prefill_pb2.Admitted:
    """Reads the stream to its end."""
    admitted, *_ = [event async for event in call]
    return admitted.admitted


async def _decoded(nodes: Pair, request: decode_pb2.DecodeRequest) -> list[int]:
    events = [event async for event in open_decode(nodes.decode, request)]
    return [token.token_id for event in events for token in event.delta.tokens]


async def test_hand_offs_are_counted_on_both_sides() -> None:
    async with pair() as nodes:
        await generate(nodes, prefill_request(PROMPT))
        await nodes.prefill.wait_idle()
        tickets = (await _state(nodes.prefill)).handoff.tickets
        assert (tickets.granted, tickets.released, tickets.expired) == (1, 1, 0)
        [pulls] = (await _state(nodes.decode)).handoff.pulls
        assert pulls.worker_id == (await _state(nodes.prefill)).worker_id
        assert (pulls.transport, pulls.pulled, pulls.pulled_blocks) == (generation_pb2.TRANSPORT_TCP, 1, 11)
        for at in (nodes.prefill, nodes.decode):
            counts = (await _state(at)).requests
            assert (counts.received, counts.ok) == (1, 1)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_a_worker_whose_transfer_threads_hang_is_not_ready(kind: str) -> None:
    async with pair() as nodes:
        at: Node = getattr(nodes, kind)
        holder = at.worker._producer._checksummer if kind == "prefill" else at.worker._puller
        leave, entered = threading.Event(), threading.Event()
        for _ in range(2):
            holder._threads.submit(lambda: (entered.set(), leave.wait(10)))
        await asyncio.to_thread(entered.wait, 10)
        for _ in range(5):
            at.worker._progress.look(1.0)
        assert await _condition(at) == operations_pb2.WORKER_CONDITION_STALLED
        leave.set()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)
        at.worker._progress.look(1.0)
        assert await _condition(at) == operations_pb2.WORKER_CONDITION_SERVING

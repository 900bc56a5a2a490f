"""Cancelling, overload, refusals and lost workers: every request ends once, and nothing stays held."""

import asyncio
import time

import grpc.aio
import pytest

from gateway.relay import user_error
from gateway.settings import GatewayServerSettings
from tandem.api.v1 import operations_pb2, operations_pb2_grpc
from tandem.errors import Reason, TandemError, from_rpc_error
from tandem.interceptor import CallCounts
from tests.fakes.workers import FakeDecode, letters, spelling
from tests.service.gateway.conftest import Answer, MakeSuite, Suite, collect

ENDLESS = spelling("", then=3 + ord("x"))
PHASES = [("prefill", phase) for phase in ("queue", "admit", "run", "done")] + [
    ("decode", phase) for phase in ("reserve", "pull", "run", "token 1", "token 5", "end")
]


@pytest.mark.parametrize(("kind", "phase"), PHASES)
async def test_cancelling_ends_both_legs_at_every_phase(suite: Suite, kind: str, phase: str) -> None:
    worker = suite.prefill if kind == "prefill" else suite.decode
    worker.gates.close(phase)
    call = suite.call(text="hello", stopping={"max_tokens": 10})
    reading = asyncio.create_task(collect(call))
    await worker.gates.reached(phase)
    began = time.monotonic()
    call.cancel()
    await suite.all_idle()
    assert time.monotonic() - began < 0.5
    with pytest.raises(asyncio.CancelledError):
        await reading
    (counts,) = (count for method, count in suite.gateway.server.counts.items() if method.endswith("/Generate"))
    await suite.until(lambda: counts.cancelled == 1)
    assert (counts.received, counts.ok, counts.failed, counts.rejected) == (1, 0, 0, 0)


async def test_cancelling_in_the_queue_leaves_no_trace(make_suite: MakeSuite) -> None:
    suite = await make_suite(max_running=1)
    suite.prefill.gates.close("run")
    first = asyncio.create_task(suite.generate(text="one", stopping={"max_tokens": 3}))
    await suite.prefill.gates.reached("run")
    waiting = suite.call(text="two", stopping={"max_tokens": 3})
    reading = asyncio.create_task(collect(waiting))
    await suite.until(lambda: suite.gateway.num_running == 2)
    waiting.cancel()
    await suite.until(lambda: suite.gateway.num_running == 1)
    suite.prefill.gates.open("run")
    assert (await first).error is None
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(suite.prefill.requests) == 1


async def test_a_full_gateway_refuses_with_advice(make_suite: MakeSuite) -> None:
    suite = await make_suite(max_running=2, max_queued=3)
    suite.prefill.gates.close("run")
    running = [asyncio.create_task(suite.generate(text=f"r{number}", stopping={"max_tokens": 3})) for number in range(5)]
    await suite.until(lambda: suite.gateway.num_running == 5)
    refused = [await suite.generate(text="more") for _ in range(4)]
    for answer in refused:
        assert answer.error is not None
        assert (answer.error.reason, answer.error.code) == (Reason.QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert answer.error.retry_after_s
    suite.prefill.gates.open("run")
    assert all(answer.error is None for answer in await asyncio.gather(*running))
    assert (await suite.generate(text="again", stopping={"max_tokens": 1})).error is None


async def test_waiting_prompts_are_bounded_by_tokens(make_suite: MakeSuite) -> None:
    suite = await make_suite(max_running=1, max_queued_tokens=10)
    suite.prefill.gates.close("run")
    running = [asyncio.create_task(suite.generate(text="123456", stopping={"max_tokens": 3})) for _ in range(2)]
    await suite.until(lambda: suite.gateway.num_running == 2)
    answer = await suite.generate(text="123456")
    assert answer.error is not None and answer.error.reason is Reason.QUEUE_FULL
    suite.prefill.gates.open("run")
    await asyncio.gather(*running)


async def test_deadlines_end_the_work(suite: Suite) -> None:
    suite.decode.gates.close("token 3")
    answer = await suite.generate(timeout=0.3, text="hello", stopping={"max_tokens": 10})
    assert answer.error is not None and answer.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.all_idle()


async def test_the_servers_cap_holds_without_a_deadline(make_suite: MakeSuite) -> None:
    suite = await make_suite(max_deadline_s=0.2)
    suite.prefill.gates.close("run")
    answer = await suite.generate(timeout=None, text="hello")
    assert answer.error is not None and answer.error.reason is Reason.DEADLINE_EXCEEDED
    await suite.all_idle()


async def test_a_refused_ticket_goes_to_another_decode_worker(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    first, second = sorted(suite.decodes, key=lambda worker: worker.address)
    first.gates.faults["reserve"] = TandemError(Reason.KV_BLOCKS_EXHAUSTED, "no room")
    answer = await suite.generate(text="hello", stopping={"max_tokens": 5})
    assert answer.token_ids == [letters([3 + byte for byte in b"hello"], index) for index in range(5)]
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert first.requests[0].ticket == second.requests[0].ticket
    assert len(suite.prefill.requests) == 1


@pytest.mark.parametrize("reason", [Reason.KV_BLOCKS_EXHAUSTED, Reason.QUEUE_FULL, Reason.DRAINING])
async def test_a_ticket_that_nobody_takes_is_released(make_suite: MakeSuite, reason: Reason) -> None:
    suite = await make_suite(1, 2)
    suite.prefill.gates.close("run")
    for worker in suite.decodes:
        worker.gates.faults["reserve"] = TandemError(reason, "no")
    answer = await suite.generate(text="hello")
    assert answer.error is not None and answer.error.reason is reason
    assert answer.error.retry_after_s
    await suite.all_idle()
    assert all(len(worker.requests) == 1 for worker in suite.decodes)


async def test_a_worker_lost_before_the_first_token_is_unavailable(suite: Suite) -> None:
    suite.prefill.gates.close("run")
    answering = asyncio.create_task(suite.generate(text="hello"))
    await suite.prefill.gates.reached("run")
    await suite.prefill.kill()
    answer = await answering
    assert answer.error is not None
    assert (answer.error.reason, answer.error.code) == (Reason.WORKER_LOST, grpc.StatusCode.UNAVAILABLE)
    assert answer.error.retry_after_s
    await suite.until(lambda: not suite.decode.book.running)


@pytest.mark.parametrize("worker_error", [Reason.ENGINE_FAILED, Reason.CANCELLED, Reason.KV_CHECKSUM_MISMATCH])
async def test_a_failing_engine_is_a_lost_worker(suite: Suite, worker_error: Reason) -> None:
    suite.prefill.gates.faults["run"] = TandemError(worker_error, "broken")
    answer = await suite.generate(text="hello")
    assert answer.error is not None
    assert answer.error.reason is Reason.WORKER_LOST
    assert answer.error.metadata["cause"] == worker_error.value
    await suite.all_idle()


async def test_a_mismatch_is_not_to_be_retried(suite: Suite) -> None:
    suite.decode.gates.faults["reserve"] = TandemError(Reason.KV_LAYOUT_MISMATCH, "other shape")
    suite.prefill.gates.close("run")
    answer = await suite.generate(text="hello")
    assert answer.error is not None
    assert answer.error.code is grpc.StatusCode.FAILED_PRECONDITION
    await suite.all_idle()


async def test_a_stream_with_gaps_is_an_error_and_never_wrong_text(suite: Suite) -> None:
    suite.decode.skips = True
    answer = await suite.generate(text="hello", stopping={"max_tokens": 10})
    assert answer.error is not None
    assert answer.error.reason is Reason.INTERNAL
    assert answer.token_ids == [letters([3 + byte for byte in b"hello"], index) for index in range(2)]
    await suite.all_idle()


async def test_a_prefill_worker_lost_after_the_first_token_harms_nobody(suite: Suite) -> None:
    suite.prefill.gates.close("done")
    suite.prefill.gates.faults["done"] = TandemError(Reason.ENGINE_FAILED, "gone")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 5}))
    await suite.prefill.gates.reached("done")
    suite.prefill.gates.open("done")
    answer = await answering
    assert answer.error is None
    assert len(answer.token_ids) == 5


@pytest.mark.parametrize(("kind", "phase"), [("prefill", "done"), ("decode", "end")])
@pytest.mark.parametrize("dies", [False, True])
async def test_a_worker_stuck_or_lost_after_its_last_token_harms_nobody(suite: Suite, kind: str, phase: str, dies: bool) -> None:
    worker = suite.prefill if kind == "prefill" else suite.decode
    worker.gates.close(phase)
    answering = asyncio.create_task(suite.generate(text="hello", timeout=5, stopping={"max_tokens": 3}))
    await worker.gates.reached(phase)
    await suite.decode.gates.reached("end")
    if dies:
        await worker.kill()
    answer = await answering
    assert answer.error is None
    assert len(answer.token_ids) == answer.finished.usage.completion_tokens == 3
    await suite.until(lambda: not worker.book.running and suite.gateway.num_running == 0)


async def test_a_prefill_worker_stuck_after_the_only_token_harms_nobody(suite: Suite) -> None:
    suite.prefill.gates.close("done")
    answer = await suite.generate(text="hello", timeout=5, stopping={"max_tokens": 1})
    assert answer.error is None
    assert answer.finished.usage.completion_tokens == 1


async def test_without_workers_requests_fail_fast_and_the_gateway_is_not_ready(suite: Suite) -> None:
    assert suite.gateway.server.ready
    await suite.decode.kill()
    await suite.until(lambda: not suite.gateway.server.ready)
    began = time.monotonic()
    answer = await suite.generate(text="hello")
    assert answer.error is not None
    assert (answer.error.reason, answer.error.code) == (Reason.NO_WORKER, grpc.StatusCode.UNAVAILABLE)
    assert "decode" in answer.error.message
    assert time.monotonic() - began < 2


async def test_a_worker_that_comes_back_is_used_again(suite: Suite) -> None:
    port = int(suite.decode.address.rpartition(":")[2])
    await suite.decode.kill()
    await suite.until(lambda: not suite.gateway.server.ready)
    successor = FakeDecode(suite.model.digest, letters)
    await successor.start(port)
    await suite.until(lambda: suite.gateway.server.ready)
    assert (await suite.generate(text="hello", stopping={"max_tokens": 5})).error is None
    assert len(successor.requests) == 1
    await successor.kill()


async def test_a_draining_worker_is_not_used(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    suite.decodes[0].say(condition=operations_pb2.WORKER_CONDITION_DRAINING)
    await suite.until(lambda: sum(worker.ready for worker in suite.gateway.directory.workers) == 2)
    for number in range(3):
        assert (await suite.generate(text=f"hello {number}", stopping={"max_tokens": 2})).error is None
    assert not suite.decodes[0].requests


async def test_a_draining_gateway_finishes_and_refuses(suite: Suite) -> None:
    suite.decode.gates.close("token 3")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 5}))
    await suite.decode.gates.reached("token 3")
    draining = asyncio.create_task(suite.gateway.drain())
    await suite.until(lambda: suite.gateway.draining)
    answer = await suite.generate(text="late")
    assert answer.error is not None and answer.error.reason is Reason.DRAINING
    suite.decode.gates.open("token 3")
    assert len((await answering).token_ids) == 5
    await draining


@pytest.mark.parametrize(("phase", "reason", "num_tokens"), [("token 3", Reason.STREAM_BROKEN, 3), ("admit", Reason.DRAINING, 0)])
async def test_what_a_gateway_cannot_finish_when_it_leaves_says_how_far_it_got(
    make_suite: MakeSuite, phase: str, reason: Reason, num_tokens: int
) -> None:
    """No client may simply ask again for what it has in part."""
    suite = await make_suite(server=GatewayServerSettings(port=0, grace_s=0.5))
    worker = suite.prefill if phase == "admit" else suite.decode
    worker.gates.close(phase)
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 5}))
    await worker.gates.reached(phase)
    await suite.gateway.stop()
    answer = await answering
    assert answer.error is not None
    assert (answer.error.reason, len(answer.token_ids)) == (reason, num_tokens)
    assert answer.error.metadata.get("tokens_delivered", "0") == str(num_tokens)
    assert answer.error.code is (grpc.StatusCode.ABORTED if num_tokens else grpc.StatusCode.UNAVAILABLE)
    assert suite.gateway.counts().requests.received == 1


async def test_a_client_that_takes_nothing_is_cut_off_and_others_are_not(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=ENDLESS, stall_limit_s=0.3)
    address = f"127.0.0.1:{suite.gateway.server.port}"
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        slow = Suite(suite.gateway, suite.model, channel, suite.prefills, suite.decodes).call(
            text="hello", stopping={"max_tokens": 2000}, output={"logprobs": 20}
        )
        await slow.read()
        other = await suite.generate(text="other", stopping={"max_tokens": 50})
        assert other.error is None
        counts = next(count for method, count in suite.gateway.server.counts.items() if method.endswith("/Generate"))
        await suite.until(lambda: counts.rejected == 1)
        await suite.all_idle()
        slow.cancel()


async def test_operators_see_the_suite(suite: Suite) -> None:
    handoff = operations_pb2.HandoffCounts(tickets=operations_pb2.TicketCounts(granted=3, expired=1))
    suite.prefill.say(queued_tokens=77, free_blocks=5, requests=CallCounts(received=3, ok=2, failed=1), handoff=handoff)
    await suite.until(lambda: any(worker.queued_tokens == 77 for worker in suite.gateway.directory.workers))
    stub = operations_pb2_grpc.OperationsServiceStub(suite.channel)
    shown = await stub.GetSuite(operations_pb2.GetSuiteRequest())
    prefill, decode = shown.workers
    assert (prefill.role, decode.role) == (operations_pb2.WORKER_ROLE_PREFILL, operations_pb2.WORKER_ROLE_DECODE)
    assert (prefill.queued_tokens, prefill.free_blocks, prefill.ready) == (77, 5, True)
    assert prefill.requests == operations_pb2.RequestCounts(received=3, ok=2, failed=1)
    assert prefill.handoff == handoff
    assert prefill.condition == operations_pb2.WORKER_CONDITION_SERVING
    assert (prefill.worker_id, prefill.address) == (suite.prefill.worker_id, suite.prefill.address)
    for trace_id, code in (("zz", grpc.StatusCode.INVALID_ARGUMENT), ("0" * 32, grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetTrace(operations_pb2.GetTraceRequest(trace_id=trace_id))
        assert raised.value.code() is code


def test_what_a_failure_means_depends_on_the_tokens_out() -> None:
    lost = TandemError(Reason.TRANSFER_INTERRUPTED, "cut")
    assert user_error(lost, 0).reason is Reason.WORKER_LOST
    assert user_error(lost, 3).reason is Reason.STREAM_BROKEN
    full = TandemError(Reason.QUEUE_FULL, "full")
    assert user_error(full, 0) is full
    assert user_error(full, 1).reason is Reason.STREAM_BROKEN
    late = TandemError(Reason.DEADLINE_EXCEEDED, "late")
    assert user_error(late, 3) is late


async def test_a_ticket_on_its_way_when_the_client_goes_is_released(suite: Suite) -> None:
    """Prefill ends at once, so that its whole stream may be under way while the client's cancel arrives."""
    for number in range(40):
        call = suite.call(text=f"hello {number}", stopping={"max_tokens": 10})
        reading = asyncio.create_task(collect(call))
        await suite.until(lambda number=number: len(suite.prefill.tickets) > number)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    began = time.monotonic()
    await suite.all_idle()
    assert time.monotonic() - began < 0.5


async def test_a_deadline_reaches_a_client_that_takes_nothing(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=ENDLESS, max_deadline_s=0.5)
    address = f"127.0.0.1:{suite.gateway.server.port}"
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        slow = Suite(suite.gateway, suite.model, channel, suite.prefills, suite.decodes).call(
            text="hello", stopping={"max_tokens": 2000}, output={"logprobs": 20}
        )
        await slow.read()
        counts = next(count for method, count in suite.gateway.server.counts.items() if method.endswith("/Generate"))
        await suite.until(lambda: counts.cancelled == 1)
        await suite.all_idle()
        answer = await collect_rest(slow)
        assert answer.error is not None and answer.error.reason is Reason.DEADLINE_EXCEEDED


async def collect_rest(call: grpc.aio.UnaryStreamCall) -> Answer:
    answer = Answer()
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            answer.responses.append(response)
    except grpc.aio.AioRpcError as error:
        answer.error = from_rpc_error(error)
    return answer


async def test_a_request_that_ends_well_counts_as_ok_at_the_workers(suite: Suite) -> None:
    for number in range(20):
        assert (await suite.generate(text=f"hello {number}", stopping={"max_tokens": 3})).error is None
    await suite.all_idle()
    for worker, method in ((suite.prefill, "PrefillService/Prefill"), (suite.decode, "DecodeService/Decode")):
        counts = worker.interceptor.counts[f"/tandem.worker.v1.{method}"]
        await suite.until(lambda counts=counts: counts.received == counts.ok + counts.cancelled)
        assert counts.cancelled == 0, (method, counts)


async def test_a_shutdown_ends_the_legs_and_frees_the_tickets(make_suite: MakeSuite) -> None:
    suite = await make_suite(server=GatewayServerSettings(port=0, grace_s=0.1))
    suite.decode.gates.close("pull")
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 5}))
    await suite.decode.gates.reached("pull")
    await suite.gateway.stop()
    assert [ticket.fate for ticket in suite.prefill.tickets.values()] == ["released"]
    await suite.all_idle()
    answer = await answering
    assert answer.error is not None
    assert answer.error.code is (grpc.StatusCode.ABORTED if answer.token_ids else grpc.StatusCode.UNAVAILABLE)

"""What operators can count on: every request ends in exactly one way, and what lost workers led to; and a client's second try."""

import asyncio

import grpc

from tandem.api.v1 import operations_pb2, operations_pb2_grpc
from tandem.errors import Reason, TandemError
from tests.service.gateway.conftest import MakeSuite, Suite, collect


async def suite_of(suite: Suite) -> operations_pb2.GetSuiteResponse:
    return await operations_pb2_grpc.OperationsServiceStub(suite.channel).GetSuite(operations_pb2.GetSuiteRequest())


async def test_every_request_is_counted_once_however_it_ends(make_suite: MakeSuite) -> None:
    suite = await make_suite(max_running=1, max_queued=1)
    assert (await suite.generate(text="ok", stopping={"max_tokens": 3})).error is None
    assert (await suite.generate(text="")).error is not None
    suite.prefill.gates.close("run")
    running, waiting = suite.call(text="runs"), suite.call(text="waits")
    reading = [asyncio.create_task(collect(call)) for call in (running, waiting)]
    await suite.until(lambda: suite.gateway.num_running == 2)
    assert (await suite.generate(text="refused")).error is not None
    shown = await suite_of(suite)
    assert (shown.running_requests, shown.queued_requests) == (1, 1)
    assert shown.requests.received == 5
    running.cancel()
    waiting.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    suite.prefill.gates.open("run")
    suite.prefill.gates.faults["run"] = TandemError(Reason.ENGINE_FAILED, "broken")
    assert (await suite.generate(text="fails")).error is not None
    await suite.until(lambda: suite.gateway.counts().requests.cancelled == 2)
    ended = (await suite_of(suite)).requests
    assert (ended.received, ended.ok, ended.cancelled, ended.rejected, ended.failed) == (6, 1, 2, 2, 1)


async def test_fail_overs_are_counted(make_suite: MakeSuite) -> None:
    suite = await make_suite(2, 2)
    for worker, phase in ((suite.prefills, "run"), (suite.decodes, "token 3")):
        first, _ = sorted(worker, key=lambda each: each.address)
        first.gates.next_faults[phase] = TandemError(Reason.ENGINE_FAILED, "broken")
    assert (await suite.generate(text="hello", stopping={"max_tokens": 10})).error is None
    failover = (await suite_of(suite)).failover
    assert (failover.retries, failover.migrations, failover.quarantined, failover.ejections) == (1, 1, 0, 0)


async def test_an_idempotency_key_is_refused_while_its_request_runs(suite: Suite) -> None:
    suite.decode.gates.close("token 3")
    fields = {"text": "hello", "stopping": {"max_tokens": 5}, "idempotency_key": "k"}
    first = asyncio.create_task(suite.generate(**fields))
    await suite.decode.gates.reached("token 3")
    second = await suite.generate(**fields)
    assert second.error is not None
    assert (second.error.reason, second.error.code) == (Reason.ALREADY_EXISTS, grpc.StatusCode.ALREADY_EXISTS)
    assert (await suite.generate(**{**fields, "idempotency_key": "other", "stopping": {"max_tokens": 2}})).error is None
    suite.decode.gates.open("token 3")
    assert (await first).error is None
    assert (await suite.generate(**fields)).error is None
    assert len(suite.prefill.requests) == 3


async def test_an_idempotency_key_is_free_again_however_its_request_ended(suite: Suite) -> None:
    assert (await suite.generate(text="", idempotency_key="k")).error is not None
    suite.prefill.gates.close("run")
    call = suite.call(text="hello", idempotency_key="k")
    reading = asyncio.create_task(collect(call))
    await suite.prefill.gates.reached("run")
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await suite.all_idle()
    suite.prefill.gates.open("run")
    assert (await suite.generate(text="hello", idempotency_key="k", stopping={"max_tokens": 2})).error is None


async def test_an_overlong_idempotency_key_is_refused(suite: Suite) -> None:
    answer = await suite.generate(text="hello", idempotency_key="k" * 129)
    assert answer.error is not None
    assert [violation.field for violation in answer.error.violations] == ["idempotency_key"]

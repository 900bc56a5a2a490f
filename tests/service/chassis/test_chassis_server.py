"""What every server offers: health by name, reflection, trace context, options, cancellation, deadlines."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace

from tandem.channels import call_metadata, channel_options, open_channel, open_internal_channel
from tandem.errors import Reason, from_rpc_error
from tandem.interceptor import CallCounts
from tandem.server import ListenError, Server, ServerSettings, server_options
from tandem.tracing import configure_tracing, tracer
from tandem.worker.v1 import prefill_pb2, prefill_pb2_grpc

PREFILL = "tandem.worker.v1.PrefillService"
METHOD = f"/{PREFILL}/Prefill"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class EndlessPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Admits and then waits, or writes, for ever; `ended` is set by the `finally`."""

    def __init__(self, *, chatty: bool = False) -> None:
        self.chatty = chatty
        self.ended = asyncio.Event()
        self.trace_id = 0

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        self.trace_id = trace.get_current_span().get_span_context().trace_id
        try:
            yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted())
            while self.chatty:
                yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())
            await asyncio.Event().wait()
        finally:
            self.ended.set()


def added(servicer: EndlessPrefill):
    return prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, PREFILL


async def check(channel: grpc.aio.Channel, service: str) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return response.status


async def test_health_follows_readiness_by_name_and_the_process_is_live(start):
    server, channel = await start(added(EndlessPrefill()))
    names = [PREFILL, "toy.ready", "grpc.health.v1.Health"]
    assert await check(channel, "") == SERVING
    assert [await check(channel, name) for name in names] == [NOT_SERVING] * 3
    server.set_ready(True)
    assert server.ready
    assert [await check(channel, name) for name in names] == [SERVING] * 3
    server.set_ready(False)
    assert [await check(channel, name) for name in ["", *names]] == [SERVING] + [NOT_SERVING] * 3


async def test_health_of_an_unknown_name_is_not_found(start):
    _, channel = await start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(channel, "nobody")
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_SERVICE)


async def test_every_health_watcher_learns_changes_also_after_another_has_left(start):
    server, channel = await start(added(EndlessPrefill()))
    stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service=PREFILL)
    leaving, staying = stub.Watch(request), stub.Watch(request)
    assert [(await call.read()).status for call in (leaving, staying)] == [NOT_SERVING] * 2
    leaving.cancel()
    server.set_ready(True)
    assert (await staying.read()).status == SERVING
    staying.cancel()


async def test_reflection_lists_every_service(start):
    _, channel = await start(added(EndlessPrefill()))
    assert await reflected_services(channel) == {PREFILL, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_reflection_can_be_off(start):
    _, channel = await start(reflection=False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reflected_services(channel)
    assert from_rpc_error(caught.value).reason is Reason.UNIMPLEMENTED


async def reflected_services(channel: grpc.aio.Channel) -> set[str]:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    response = await call.read()
    call.cancel()
    return {service.name for service in response.list_services_response.service}


@pytest.mark.parametrize("chatty", [False, True], ids=["waiting", "writing"])
async def test_cancelling_reaches_the_handlers_finally(start, chatty):
    servicer = EndlessPrefill(chatty=chatty)
    server, channel = await start(added(servicer))
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest())
    assert (await call.read()).WhichOneof("event") == "admitted"
    call.cancel()
    async with asyncio.timeout(5):
        await servicer.ended.wait()
    assert server.counts[METHOD] == CallCounts(received=1, cancelled=1)


async def test_client_that_vanishes_is_a_cancel(start):
    servicer = EndlessPrefill(chatty=True)
    server, channel = await start(added(servicer))
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest())
    await call.read()
    await channel.close()
    async with asyncio.timeout(5):
        await servicer.ended.wait()
    assert server.counts[METHOD] == CallCounts(received=1, cancelled=1)


async def test_deadline_reaches_the_handlers_finally(start):
    servicer = EndlessPrefill()
    server, channel = await start(added(servicer))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest(), timeout=0.2):
            pass
    assert from_rpc_error(caught.value).reason is Reason.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        await servicer.ended.wait()
    assert server.counts[METHOD] == CallCounts(received=1, cancelled=1)


async def test_handler_runs_in_the_callers_trace(start):
    configure_tracing("toy")
    servicer = EndlessPrefill()
    _, channel = await start(added(servicer))
    with tracer().start_as_current_span("client") as span:
        expected, metadata = span.get_span_context().trace_id, call_metadata()
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest(), metadata=metadata)
        await call.read()
    call.cancel()
    assert expected and servicer.trace_id == expected


async def test_malformed_trace_context_is_ignored(start):
    servicer = EndlessPrefill()
    _, channel = await start(added(servicer))
    metadata = (("traceparent", "00-nonsense"),)
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest(), metadata=metadata)
    assert (await call.read()).WhichOneof("event") == "admitted"
    call.cancel()
    assert servicer.trace_id == 0


async def test_a_taken_port_is_said_plainly(start):
    server, _ = await start()
    with pytest.raises(ListenError, match="cannot listen on"):
        await Server("second", ServerSettings(port=server.port)).start()


def test_frozen_peers_are_noticed_from_both_ends():
    server, client = dict(server_options(7)), dict(channel_options(1.0, 1.5, 4096))
    assert client["grpc.keepalive_time_ms"] == 1000
    assert client["grpc.keepalive_timeout_ms"] == client["grpc.http2.ping_timeout_ms"] == 1500
    assert server["grpc.http2.ping_timeout_ms"] == server["grpc.keepalive_timeout_ms"] == 2000
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    for options in (server, client):
        assert options["grpc.keepalive_permit_without_calls"] == 1
        assert options["grpc.http2.max_pings_without_data"] == 0
    assert (server["grpc.so_reuseport"], server["grpc.max_concurrent_streams"]) == (0, 7)
    assert (client["grpc.enable_retries"], client["grpc.max_receive_message_length"]) == (0, 4096)


FROZEN = """
import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from tandem.server import Server, ServerSettings, run

async def main():
    server = Server("toy", ServerSettings())
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

run(main())
"""


async def test_a_frozen_server_is_noticed(repository):
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", FROZEN, cwd=repository, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    channel = open_internal_channel(f"127.0.0.1:{int(await process.stdout.readline())}")
    try:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(6.0):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
        assert from_rpc_error(caught.value).reason is Reason.WORKER_LOST
    finally:
        process.kill()
        await process.wait()
        await channel.close()


FEW_DESCRIPTORS = """
import asyncio, resource, sys
from tandem.server import Server, ServerSettings, run

async def main():
    server = Server("toy", ServerSettings(exit_with_parent=True))
    print(await server.start(), flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    server.set_ready(True)
    async def nothing(): ...
    await server.run_until_stopped(nothing, nothing)

run(main())
"""


def test_e3_a_server_out_of_descriptors_serves_those_it_has_and_recovers(repository):
    command = [sys.executable, "-c", FEW_DESCRIPTORS]
    with subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asyncio.run(flood(int(process.stdout.readline())))
        process.stdin.close()
        assert process.wait(timeout=30) == 0


async def flood(port: int) -> None:
    """More connections than the server has descriptors, then none of them."""
    request = health_pb2.HealthCheckRequest(service="toy.ready")
    async with open_channel(f"127.0.0.1:{port}") as early:
        assert (await health_pb2_grpc.HealthStub(early).Check(request, timeout=10)).status == SERVING
        with contextlib.ExitStack() as connections:
            for _ in range(200):
                connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            assert (await health_pb2_grpc.HealthStub(early).Check(request, timeout=10)).status == SERVING
    async with open_channel(f"127.0.0.1:{port}") as late:
        check = health_pb2_grpc.HealthStub(late).Check(request, timeout=20, wait_for_ready=True)
        assert (await check).status == SERVING

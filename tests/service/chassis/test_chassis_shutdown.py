"""The ordered end: not ready, drain, server, close, spans; with streams in flight."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem import server as server_module
from tandem.errors import Reason, TandemError, from_rpc_error
from tandem.interceptor import CallCounts
from tandem.worker.v1 import prefill_pb2, prefill_pb2_grpc

PREFILL = "tandem.worker.v1.PrefillService"


class SlowPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Admits, waits until `finish` is set, ends. Refuses everything once `draining`."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()
        self.ended = asyncio.Event()
        self.draining = False

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        if self.draining:
            raise TandemError(Reason.DRAINING, "draining")
        try:
            yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted())
            await self.finish.wait()
            yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())
        finally:
            self.ended.set()


@pytest.fixture
def servicer() -> SlowPrefill:
    return SlowPrefill()


@pytest.fixture
async def opened(start, servicer):
    """Server, channel, and a stream that has been admitted."""
    server, channel = await start((prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, PREFILL), grace_s=5.0)
    server.set_ready(True)
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest())
    assert (await call.read()).WhichOneof("event") == "admitted"
    return server, channel, call


async def nothing() -> None:
    return


async def refusal(channel: grpc.aio.Channel) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest()):
            pass
    return from_rpc_error(caught.value).reason


async def test_steps_run_in_order_and_the_running_stream_ends_well(opened, servicer, monkeypatch):
    server, channel, call = opened
    steps: list[str] = []
    monkeypatch.setattr(server_module, "flush_tracing", lambda: steps.append("flush"))

    async def drain() -> None:
        servicer.draining = True
        health = health_pb2_grpc.HealthStub(channel)
        ready = [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", "toy.ready", PREFILL)]
        assert ready == [1, 2, 2]
        assert await refusal(channel) is Reason.DRAINING
        servicer.finish.set()
        await servicer.ended.wait()
        steps.append("drain")

    async def close() -> None:
        steps.append("close")

    serving = asyncio.create_task(server.run_until_stopped(drain, close))
    server.stop()
    assert (await call.read()).WhichOneof("event") == "done"
    await serving
    assert steps == ["drain", "close", "flush"]
    assert await refusal(channel) is Reason.WORKER_LOST
    assert server.counts[f"/{PREFILL}/Prefill"] == CallCounts(received=2, ok=1, rejected=1)


async def test_a_stopped_server_is_not_ready_at_once_and_for_good(opened):
    server, _, _ = opened
    server.stop()
    assert not server.ready
    server.set_ready(True)
    assert not server.ready


async def test_watchers_do_not_hold_up_the_end(opened, servicer):
    server, channel, _ = opened
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="toy.ready"))
    assert (await watch.read()).status == 1
    servicer.finish.set()
    server.stop()
    async with asyncio.timeout(4.0):
        await server.run_until_stopped(servicer.ended.wait, nothing)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            assert (await watch.read()).status == 2
    assert from_rpc_error(caught.value).reason is Reason.DRAINING
    assert server.counts["/grpc.health.v1.Health/Watch"] == CallCounts(received=1, rejected=1)


async def test_what_outlives_the_grace_is_told_to_go_elsewhere(start, servicer):
    server, channel = await start((prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, PREFILL), grace_s=0.2)
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest())
    await call.read()
    server.stop()
    await server.run_until_stopped(asyncio.Event().wait, nothing)
    await servicer.ended.wait()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).reason is Reason.DRAINING
    assert server.counts[f"/{PREFILL}/Prefill"] == CallCounts(received=1, rejected=1)


async def test_a_step_that_raises_does_not_keep_the_later_ones_from_running(opened, servicer):
    server, _, _ = opened
    closed = asyncio.Event()
    servicer.finish.set()

    async def drain() -> None:
        raise OSError("drain broke")

    async def close() -> None:
        closed.set()

    server.stop()
    with pytest.raises(OSError, match="drain broke"):
        await server.run_until_stopped(drain, close)
    assert closed.is_set()


PROGRAM = """
import asyncio, sys
from tandem.server import Server, ServerSettings, run

async def say(text):
    print(text, flush=True)

async def main():
    server = Server("toy", ServerSettings(exit_with_parent=sys.argv[1] == "parent"))
    print(await server.start(), flush=True)
    await server.run_until_stopped(lambda: say("drain"), lambda: say("close"))
    return 3

run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "parent"])
def test_a_process_ends_on_signals_and_with_its_parent(how, repository):
    command = [sys.executable, "-c", PROGRAM, str(how)]
    with subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        assert port > 0
        if how == "parent":
            process.stdin.close()
        else:
            os.kill(process.pid, how)
        assert process.stdout.read().split() == ["drain", "close"]
        assert process.wait(timeout=30) == 3


SECOND = """
import sys
from tandem.server import Server, ServerSettings, run

async def main():
    await Server("second", ServerSettings(port=int(sys.argv[1]))).start()

run(main())
"""


def test_a_taken_port_ends_the_process_with_a_plain_message(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", SECOND, str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "error: cannot listen on 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr

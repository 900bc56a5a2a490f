"""Messages, headers and connections that are meant to hurt: refused in a process whose memory and descriptors stay as they were."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
import psutil
import pytest

from tandem.api.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from tandem.channels import open_channel

MB = 1 << 20
NO_LIMITS = (("grpc.max_metadata_size", 64 * MB), ("grpc.absolute_max_metadata_size", 64 * MB))


@dataclass
class GatewayProcess:
    address: str
    process: psutil.Process

    async def peak_bytes(self, until: "asyncio.Task[None]") -> int:
        """The most memory that the process had until a task was done."""
        peak = 0
        while not until.done():
            peak = max(peak, self.process.memory_info().rss)
            await asyncio.wait((until,), timeout=0.002)
        until.result()
        return peak


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayProcess]:
    command = (sys.executable, "-m", "gateway", "--model", "random:tiny", "--port", "0")
    targets = ("--prefill-targets", "127.0.0.1:1", "--decode-targets", "127.0.0.1:1")
    process = await asyncio.create_subprocess_exec(*command, *targets, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    port = None
    while port is None:
        port = re.search(rb"listens on .*:(\d+)", await process.stderr.readline())
    reading = asyncio.create_task(process.stderr.read())
    yield GatewayProcess(f"127.0.0.1:{int(port[1])}", psutil.Process(process.pid))
    process.terminate()
    assert await process.wait() == 0
    assert b"Traceback" not in await reading


async def refuse(
    address: str, text: str, metadata: Sequence[tuple[str, str]] = (), compression: grpc.Compression | None = None
) -> None:
    """Sends it three times; each is refused as too much."""
    async with grpc.aio.insecure_channel(address, options=NO_LIMITS) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(text=text)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Generate(request, metadata=tuple(metadata), compression=compression, timeout=20).read()
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_too_much_is_refused_and_costs_no_memory(gateway: GatewayProcess) -> None:
    await serves(gateway.address)
    before = gateway.process.memory_info().rss
    for attack in (
        refuse(gateway.address, "x" * (5 * MB)),
        refuse(gateway.address, "x" * (64 * MB), compression=grpc.Compression.Gzip),
        refuse(gateway.address, "x", metadata=[(f"k{number}", "v") for number in range(100_000)]),
        refuse(gateway.address, "x", metadata=[("k", "v" * MB)]),
    ):
        assert await gateway.peak_bytes(asyncio.create_task(attack)) - before < 50 * MB
    await serves(gateway.address)


async def test_connections_that_come_and_go_leave_nothing_behind(gateway: GatewayProcess) -> None:
    await serves(gateway.address)
    descriptors, memory = gateway.process.num_fds(), gateway.process.memory_info().rss
    for _ in range(20):
        await asyncio.gather(*(serves(gateway.address) for _ in range(20)))
    async with asyncio.timeout(10):
        while gateway.process.num_fds() > descriptors:  # noqa: ASYNC110  (another process's descriptors have no event)
            await asyncio.sleep(0.02)
    assert gateway.process.memory_info().rss - memory < 20 * MB


async def serves(address: str) -> None:
    async with open_channel(address) as channel:
        assert (await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())).models

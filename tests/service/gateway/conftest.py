"""A gateway on random:tiny before fake workers, and what a client needs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from gateway.app import Gateway
from gateway.served_model import ServedModel, load_served_model
from gateway.settings import GatewayServerSettings, GatewaySettings
from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.channels import open_channel
from tandem.errors import TandemError, from_rpc_error
from tandem.models import resolve_model
from tandem.tracing import configure_tracing
from tests.fakes.workers import FakeDecode, FakePrefill, FakeWorker, TokenFunction, letters


@pytest.fixture(scope="session", autouse=True)
def tracing() -> None:
    configure_tracing("tandem.test")


@dataclass
class Answer:
    """A whole stream, put together."""

    responses: list[generation_pb2.GenerateResponse] = field(default_factory=list)
    error: TandemError | None = None

    @property
    def deltas(self) -> list[generation_pb2.Delta]:
        return [response.delta for response in self.responses if response.HasField("delta")]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finished(self) -> generation_pb2.Finished:
        assert self.responses[-1].HasField("finished"), self.error
        return self.responses[-1].finished


@dataclass
class Suite:
    """Gateway, workers and a channel to the gateway."""

    gateway: Gateway
    model: ServedModel
    channel: grpc.aio.Channel
    prefills: list[FakePrefill]
    decodes: list[FakeDecode]

    @property
    def prefill(self) -> FakePrefill:
        return self.prefills[0]

    @property
    def decode(self) -> FakeDecode:
        return self.decodes[0]

    def call(self, timeout: float | None = 20, **fields: object) -> grpc.aio.UnaryStreamCall:
        request = generation_pb2.GenerateRequest(**fields)
        return generation_pb2_grpc.GenerationServiceStub(self.channel).Generate(request, timeout=timeout)

    async def generate(self, timeout: float | None = 20, **fields: object) -> Answer:
        return await collect(self.call(timeout, **fields))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once something is true that this process's own event loop makes true."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  (conditions are of many objects, which have no events)
                await asyncio.sleep(0.005)

    async def all_idle(self) -> None:
        """Nothing is held for any request, anywhere."""
        for worker in (*self.prefills, *self.decodes):
            await self.until(lambda worker=worker: not worker.book.running)
        await self.until(lambda: not any(prefill.live_tickets for prefill in self.prefills))
        await self.until(lambda: self.gateway.num_running == 0)


async def collect(call: grpc.aio.UnaryStreamCall, answer: Answer | None = None) -> Answer:
    """Fills the answer as it comes, and returns it when it is over."""
    answer = answer or Answer()
    try:
        async for response in call:
            answer.responses.append(response)
    except grpc.aio.AioRpcError as error:
        answer.error = from_rpc_error(error)
    return answer


MakeSuite = Callable[..., Awaitable[Suite]]


@asynccontextmanager
async def running(worker: FakeWorker) -> AsyncIterator[FakeWorker]:
    async with worker:
        yield worker


@pytest.fixture
async def make_suite() -> AsyncIterator[MakeSuite]:
    """Makes suites: number of workers, token function, gateway settings."""
    async with AsyncExitStack() as stack:

        async def make(
            num_prefill: int = 1, num_decode: int = 1, token: TokenFunction = letters, *, wait: bool = True, **settings: object
        ) -> Suite:
            model = load_served_model(resolve_model("random:tiny"), cache=None)  # type: ignore[arg-type]
            prefills = [await stack.enter_async_context(running(FakePrefill(model.digest, token))) for _ in range(num_prefill)]
            decodes = [await stack.enter_async_context(running(FakeDecode(model.digest, token))) for _ in range(num_decode)]
            gateway = Gateway(model, _settings(prefills, decodes, settings))
            port = await gateway.start()
            stack.push_async_callback(gateway.stop)
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}"))
            suite = Suite(gateway, model, channel, prefills, decodes)
            if wait:
                await suite.until(lambda: all(worker.ready for worker in gateway.directory.workers))
            return suite

        yield make


def _settings(prefills: list[FakePrefill], decodes: list[FakeDecode], others: dict[str, object]) -> GatewaySettings:
    return GatewaySettings(
        model="random:tiny",
        prefill_targets=tuple(worker.address for worker in prefills),
        decode_targets=tuple(worker.address for worker in decodes),
        **{"server": GatewayServerSettings(port=0), **others},  # type: ignore[arg-type]
    )


@pytest.fixture
async def suite(make_suite: MakeSuite) -> Suite:
    """One worker of each kind."""
    return await make_suite()

"""The live view of workers: names that are looked up again, workers that restart, lie, or fall silent."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest

from gateway.failover import Loss
from gateway.routing import Role, Worker
from gateway.targets import Target, look_up, turns_away
from gateway.wire import worker_from
from gateway.workers import WatchTimes, WorkerDirectory
from tandem.api.v1 import operations_pb2
from tandem.worker.v1 import status_pb2, status_pb2_grpc
from tests.fakes.workers import FakeDecode, FakePrefill

NAME = Target("prefill", 50061, by_name=True)
QUICK = WatchTimes(look_up_s=0.01, first_pause_s=0.01, longest_pause_s=0.05, silence_s=0.2)


class View:
    """A directory of one name, whose addresses the test chooses."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.changes = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.directory = WorkerDirectory([(Role.PREFILL, NAME)], self._changed, times=QUICK, resolve=self._resolve)

    def _changed(self, address: str) -> None:
        task = asyncio.get_running_loop().create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self.changes:
            self.changes.notify_all()

    async def _resolve(self, target: Target) -> list[str]:
        return self.addresses

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.changes:
            await self.changes.wait_for(condition)

    @property
    def ready(self) -> list[str]:
        return [worker.address for worker in self.directory.workers if worker.ready]


@pytest.fixture
async def view() -> AsyncIterator[View]:
    view = View()
    view.directory.start()
    yield view
    await view.directory.close()


async def test_workers_behind_a_name_come_and_go(view: View) -> None:
    async with FakePrefill("model") as first, FakePrefill("model") as second:
        view.addresses = [first.address]
        await view.until(lambda: view.ready == [first.address])
        view.addresses = [first.address, second.address]
        await view.until(lambda: len(view.ready) == 2)
        view.addresses = [second.address]
        # Still reachable, so still known: requests may be running there.
        assert len(view.ready) == 2
        await first.kill()
        await view.until(lambda: [worker.address for worker in view.directory.workers] == [second.address])
        with pytest.raises(KeyError):
            view.directory.channel(first.address)


async def test_a_worker_of_the_other_role_is_never_ready(view: View) -> None:
    async with FakeDecode("model") as wrong:
        view.addresses = [wrong.address]
        await view.until(lambda: any(worker.worker_id for worker in view.directory.workers))
        assert view.ready == []


class StrangeStatus(status_pb2_grpc.WorkerStatusServiceServicer):
    """Sends what the test wants, then falls silent."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.num_calls = 0

    async def Watch(
        self, request: status_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[status_pb2.WatchResponse]:
        self.num_calls += 1
        for place, number in enumerate(self.numbers):
            yield status_pb2.WatchResponse(sequence_number=number, worker_id="w", role=1, ready=True, free_blocks=place)
        await asyncio.Event().wait()


@pytest.fixture
async def strange() -> AsyncIterator[tuple[StrangeStatus, str]]:
    servicer = StrangeStatus(1, 3, 2, 4)
    server = grpc.aio.server()
    status_pb2_grpc.add_WorkerStatusServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_stale_words_are_ignored_and_silence_is_loss(view: View, strange: tuple[StrangeStatus, str]) -> None:
    servicer, address = strange
    seen: list[int] = []

    def note() -> bool:
        seen.extend(worker.free_blocks for worker in view.directory.workers if worker.ready)
        return 3 in seen

    view.addresses = [address]
    await view.until(note)
    assert 2 not in seen
    await view.until(lambda: view.ready == [])
    await view.until(lambda: view.ready == [address])  # it is asked again
    assert servicer.num_calls >= 2


async def test_names_are_looked_up_by_the_system() -> None:
    assert "127.0.0.1:5" in await look_up(Target("127.0.0.1", 5, by_name=True))
    assert await look_up(Target("no-such-name.invalid", 5, by_name=True)) == ()


def test_every_word_of_a_worker_is_kept() -> None:
    response = status_pb2.WatchResponse(worker_id="w", role=2, ready=True, queued_tokens=5, transports=["shm", "tcp"])
    worker = worker_from(Worker("a:1", Role.DECODE), response)
    assert (worker.address, worker.ready, worker.queued_tokens, worker.transports) == ("a:1", True, 5, ("shm", "tcp"))


class TestEvidence:
    """Of the death of a worker that broke a request."""

    @pytest.fixture
    async def lost(self, view: View) -> AsyncIterator[tuple[FakePrefill, Loss]]:
        """A worker that is known, and what a request has of it that it breaks just now."""
        async with FakePrefill("model") as worker:
            view.addresses = [worker.address]
            await view.until(lambda: view.ready == [worker.address])
            yield worker, view.directory.losses.of(worker.worker_id)

    async def test_a_process_that_is_gone(self, view: View, lost: tuple[FakePrefill, Loss]) -> None:
        worker, loss = lost
        await worker.kill()
        await view.directory.losses.settled(loss)
        assert loss.ended is True

    async def test_another_process_at_its_address(self, view: View, lost: tuple[FakePrefill, Loss]) -> None:
        worker, loss = lost
        worker.become_another()
        await view.directory.losses.settled(loss)
        assert loss.ended is True

    @pytest.mark.parametrize("condition", [operations_pb2.WORKER_CONDITION_STALLED, operations_pb2.WORKER_CONDITION_DRAINING])
    async def test_the_end_of_one_that_had_stopped_before_is_none(
        self, view: View, lost: tuple[FakePrefill, Loss], condition: operations_pb2.WorkerCondition
    ) -> None:
        worker, loss = lost
        worker.say(condition=condition)
        await view.until(lambda: view.ready == [])
        await worker.kill()
        await view.directory.losses.settled(loss)
        assert loss.ended is False

    async def test_silence_is_none(self, view: View, lost: tuple[FakePrefill, Loss]) -> None:
        worker, loss = lost
        worker.fall_silent()
        await view.directory.losses.settled(loss)
        await worker.kill()
        assert loss.ended is False


async def test_an_address_turns_away_if_it_refuses_or_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert not await turns_away(address), "a frozen process is silent"
    assert await turns_away(address)
    proxy = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with proxy:
        assert await turns_away(f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    async with FakePrefill("model") as worker:
        assert not await turns_away(worker.address)
    assert not await turns_away("no-such-name.invalid:5")

"""Follow calls to decode workers, each of which carries the tokens of all streams of one worker, a message a step."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc.aio

from gateway.calls import cancel_and_wait, end, read
from gateway.job import Token
from gateway.routing import Worker
from gateway.wire import tokens_from
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc

# A stream's last tokens may come this long after its call has said that it is finished.
TOKENS_UNDER_WAY_S = 2.0


class Inflow:
    """The tokens of one stream on their way from a Follow call to whoever takes them, in order.

    They wait while it is not open, since they may overtake the first token, which comes by another way. `take` says whether it
    wants more. `stop`, which may be set later, is called when it does not, and after a failure.
    """

    def __init__(self, take: Callable[[int, Sequence[Token]], bool]) -> None:
        self.stop: Callable[[], object] = lambda: None
        self.failure: TandemError | None = None
        self._take = take
        self._waiting: list[tuple[int, Sequence[Token]]] = []
        self._opened = False
        self._changed = asyncio.Event()

    def open(self) -> None:
        self._opened = True
        waiting, self._waiting = self._waiting, []
        for index, tokens in waiting:
            self.add(index, tokens)

    def add(self, index: int, tokens: Sequence[Token]) -> None:
        """`index` tokens of the completion came before these."""
        if not self._opened:
            self._waiting.append((index, tokens))
        elif self.failure is None:
            self._changed.set()
            try:
                if not self._take(index, tokens):
                    self.stop()
            except TandemError as error:
                self.fail(error)

    def fail(self, error: TandemError) -> None:
        if self.failure is None:
            self.failure = error
            self._changed.set()
            self.stop()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for tokens that are under way. Raises the failure, or INTERNAL if they do not come."""
        try:
            async with asyncio.timeout(TOKENS_UNDER_WAY_S):
                while not holds():
                    if self.failure is not None:
                        raise self.failure
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TandemError(Reason.INTERNAL, "the decode worker finished, but not all of its tokens came") from None


# Ends a call when its worker is lost.
Holding = Callable[[Worker, grpc.aio.UnaryStreamCall], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Route:
    """How a Decode call's deltas are to travel: by a Follow call, under a number; by the call itself if `follower_id` is empty."""

    follower_id: str = ""
    stream_number: int = 0


class Follower:
    """One Follow call to one worker; `live` from its first word to its end. `useless`: the worker does not know such calls."""

    def __init__(self, worker_id: str, call: grpc.aio.UnaryStreamCall, follower_id: str) -> None:
        self.worker_id = worker_id
        self.live = False
        self.useless = False
        self._call = call
        self._follower_id = follower_id
        self._numbers = itertools.count(1)
        self._inflows: dict[int, Inflow] = {}

    @contextlib.contextmanager
    def carrying(self, inflow: Inflow) -> Iterator[Route]:
        """The route of one stream; what still comes after the block belongs to nobody and is dropped."""
        number = next(self._numbers)
        self._inflows[number] = inflow
        try:
            yield Route(self._follower_id, number)
        finally:
            del self._inflows[number]

    async def run(self) -> None:
        """Hands tokens out until the call ends, which fails every stream that it carries."""
        error = TandemError(Reason.WORKER_LOST, "the worker ended the call that carried this stream's tokens")
        try:
            while (response := await read(self._call)) is not None:
                self.live = True
                self._hand_out(response)
        except TandemError as failure:
            self.useless = not self.live and failure.reason is not Reason.WORKER_LOST
            error = TandemError(Reason.WORKER_LOST, f"the call that carried this stream's tokens failed: {failure.message}")
        finally:
            self.live = False
            for inflow in list(self._inflows.values()):
                inflow.fail(error)

    def _hand_out(self, response: decode_pb2.FollowResponse) -> None:
        plain = response.plain_tokens
        if not len(plain.stream_numbers) == len(plain.indexes) == len(plain.token_ids):
            raise TandemError(Reason.INTERNAL, "the worker sent columns of different lengths")
        for number, index, token_id in zip(plain.stream_numbers, plain.indexes, plain.token_ids, strict=True):
            inflow = self._inflows.get(number)
            if inflow is not None:
                inflow.add(index, (Token(token_id),))
        for each in response.deltas:
            inflow = self._inflows.get(each.stream_number)
            if inflow is not None:
                inflow.add(each.delta.index, tokens_from(each.delta.tokens))


class Followers:
    """At most one Follow call for each decode worker. Used on the event loop; `close` once.

    Requests never wait for one: while there is none, their deltas come in their own calls.
    """

    def __init__(self) -> None:
        self._followers: dict[str, Follower] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, worker: Worker, channel: grpc.aio.Channel, holding: Holding) -> None:
        """Begins to follow a worker unless that is done, or has turned out to be useless."""
        known = self._followers.get(worker.address)
        if known is not None and known.worker_id == worker.worker_id and (known.useless or not self._tasks[worker.address].done()):
            return
        self._forget_ended()
        follower_id = uuid.uuid4().hex
        stub = decode_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Follow(decode_pb2.FollowRequest(follower_id=follower_id, plain_tokens=True))
        follower = self._followers[worker.address] = Follower(worker.worker_id, call, follower_id)
        if worker.address in self._tasks:
            self._tasks[worker.address].cancel()
        self._tasks[worker.address] = asyncio.create_task(_run(follower, worker, call, holding))

    @contextlib.contextmanager
    def route(self, worker: Worker, inflow: Inflow) -> Iterator[Route]:
        """How a stream's deltas come from a worker, for as long as the block lasts."""
        with contextlib.ExitStack() as carried:
            yield carried.enter_context(self._followers[worker.address].carrying(inflow)) if self.live(worker) else Route()

    def live(self, worker: Worker) -> bool:
        follower = self._followers.get(worker.address)
        return follower is not None and follower.live and follower.worker_id == worker.worker_id

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks.values())

    def _forget_ended(self) -> None:
        """Addresses come and go."""
        for address in [address for address, task in self._tasks.items() if task.done() and not self._followers[address].useless]:
            del self._tasks[address], self._followers[address]


async def _run(follower: Follower, worker: Worker, call: grpc.aio.UnaryStreamCall, holding: Holding) -> None:
    try:
        with contextlib.suppress(TandemError), holding(worker, call):
            await follower.run()
    finally:
        await end(call)

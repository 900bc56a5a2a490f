"""One try at a request: a prefill leg and, unless the first token ends it, a decode leg."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import grpc.aio

from gateway.calls import cancel_and_wait, end, read, see_through
from gateway.completion import Completion
from gateway.failover import HANDOFF_BREAKS, REFUSALS, Hop, HopFailed
from gateway.fleet import Fleet
from gateway.followers import Inflow
from gateway.isolation import Turn
from gateway.job import Ending, GenerationJob, Handoff, Token
from gateway.routing import Placed, Worker
from gateway.timeline import Timeline
from gateway.wire import decode_request, prefill_request, tokens_from
from tandem.channels import call_metadata
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, prefill_pb2_grpc

# A ticket that the worker has sent already is here by then.
TICKET_UNDER_WAY_S = 0.1
# So is what a prefill worker says of itself, once a decode worker has noticed that it failed.
OWN_WORD_S = 0.2
# How long a finished completion waits for workers to say where their time went; they do so at once unless they are stuck.
LAST_WORDS_S = 0.5

# Waits until the request may go to a worker by itself, where it is suspected to have killed the last one.
TakeTurn = Callable[[Hop, Worker], Awaitable[Turn]]


@dataclass(frozen=True)
class Underway:
    """A request that is being served, over all of its attempts."""

    job: GenerationJob
    completion: Completion
    timeline: Timeline

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion so far."""
        return len(self.job.token_ids) + self.completion.num_tokens

    @property
    def remaining_s(self) -> float:
        return max(self.job.deadline - self.timeline.now(), 0.0)


class Attempt:
    """Prefills the prompt and what the completion already has, under a number of its own, and goes on from there.

    What it opened it has closed when `run` ends, so that no word of an ended attempt reaches the completion.
    """

    def __init__(self, fleet: Fleet, underway: Underway, number: int, placed: Placed, take_turn: TakeTurn) -> None:
        job, completion = underway.job, underway.completion
        self._fleet = fleet
        self._underway = underway
        self._job = job
        self._completion = completion
        self._timeline = underway.timeline
        self._number = number
        self._placed = placed
        self._take_turn = take_turn
        self._num_before = completion.num_tokens
        self._token_ids: Sequence[int] = [*job.token_ids, *completion.token_ids]
        self._first_token_only = job.stopping.max_tokens - completion.num_tokens == 1
        self._ticket: asyncio.Future[kv_pb2.KvTicket] = asyncio.get_running_loop().create_future()
        self._first_token = asyncio.Event()
        self._decode_worker = placed.placement.decode
        self._inflow: Inflow | None = None
        self._held: set[Hop] = set()
        self._handoff = Handoff()
        self.passed: set[Hop] = set()

    async def run(self) -> Ending:
        """The first leg to fail ends the other; so does the completion's end, after which no leg can fail it any more.

        Raises HopFailed.
        """
        legs = [asyncio.create_task(self._prefill())]
        if not self._first_token_only:
            legs.append(asyncio.create_task(self._decode()))
        try:
            await self._until_finished(legs)
            # Only timings are still to come, and those of a decode leg that has not begun are of no interest.
            await asyncio.wait(legs if Hop.HANDOFF in self.passed else legs[:1], timeout=LAST_WORDS_S)
            return self._ending()
        finally:
            await see_through(self._end(*legs))

    async def _until_finished(self, legs: Sequence[asyncio.Task[None]]) -> None:
        finishing = asyncio.create_task(self._completion.wait_finished())
        running = set(legs)
        try:
            while running and self._completion.finished is None:
                done, _ = await asyncio.wait({finishing, *running}, return_when=asyncio.FIRST_COMPLETED)
                running -= done
                if self._completion.finished is None and any(leg.exception() for leg in done):
                    await self._fail(*legs)
        finally:
            await cancel_and_wait(finishing)

    async def _fail(self, prefill: asyncio.Task[None], *decode: asyncio.Task[None]) -> None:
        """Raises why the attempt failed. Before decode has the blocks, its failure may only be the echo of a failing prefill."""
        if not prefill.done() and not any(_refused(leg) for leg in decode):
            await asyncio.wait((prefill,), timeout=OWN_WORD_S)
        for leg in (prefill, *decode):
            if leg.done():
                leg.result()

    async def _end(self, prefill: asyncio.Task[None], *decode: asyncio.Task[None]) -> None:
        """Ends both legs. A quick prefill may be over before its ticket is here, and its blocks would wait for the lease to end."""
        await cancel_and_wait(*decode)
        if not self._first_token_only:
            await asyncio.wait((prefill, self._ticket), timeout=TICKET_UNDER_WAY_S, return_when=asyncio.FIRST_COMPLETED)
        await cancel_and_wait(prefill)
        if self._ticket.done() and Hop.HANDOFF not in self.passed:
            self._fleet.release_soon(self._placed.placement.prefill, self._ticket.result())

    async def _prefill(self) -> None:
        worker = self._placed.placement.prefill
        try:
            await self._prefill_on(worker)
        except TandemError as error:
            # With the first token here, all depends on the decode leg, which knows best whether it has its blocks.
            if not self._first_token.is_set():
                raise HopFailed(Hop.PREFILL, (worker,), error, held=Hop.PREFILL in self._held) from error

    async def _prefill_on(self, worker: Worker) -> None:
        request = prefill_request(self._job, self._number, self._token_ids, self._first_token_only)
        with await self._take_turn(Hop.PREFILL, worker) as turn:
            stub = prefill_pb2_grpc.PrefillServiceStub(self._fleet.channel(worker))  # type: ignore[no-untyped-call]
            call = stub.Prefill(request, timeout=self._underway.remaining_s, metadata=call_metadata())
            try:
                with self._fleet.holding(worker, call):
                    if self._number == 1:  # later ones are said to be there before anything can come of them
                        self._held.add(Hop.PREFILL)
                    while (event := await read(call)) is not None:
                        self._placed.prefill_arrived()
                        self._on_prefill(event, turn)
            finally:
                turn.end()
                await end(call)
        if not self._first_token.is_set():
            raise TandemError(Reason.INTERNAL, "the prefill worker ended its stream without a first token")

    def _on_prefill(self, event: prefill_pb2.PrefillResponse, turn: Turn) -> None:
        match event.WhichOneof("event"):
            case "taken":
                self._held.add(Hop.PREFILL)
            case "admitted":
                self._held.add(Hop.PREFILL)
                if not self._num_before:
                    self._completion.num_cached_tokens = event.admitted.cached_tokens
                if event.admitted.HasField("ticket") and not self._ticket.done():
                    self._ticket.set_result(event.admitted.ticket)
            case "first_token" if not self._first_token.is_set():
                self._on_first_token(event.first_token)
                turn.end()
            case "done":
                self._timeline.prefill_queue_us = event.done.queue_us

    def _on_first_token(self, event: prefill_pb2.FirstToken) -> None:
        completion, output = self._completion, self._job.output
        self._timeline.first_token()
        if event.HasField("done"):
            self._timeline.prefill_queue_us = event.done.queue_us
        if not self._num_before and (output.echo or output.num_prompt_logprobs is not None):
            completion.give_prompt(tokens_from(event.prompt_logprobs))
        completion.push(self._num_before, tokens_from((event.token,)))
        self.passed.add(Hop.PREFILL)
        self._first_token.set()
        if self._inflow is not None:
            self._inflow.open()

    async def _decode(self) -> None:
        """Offers the ticket to the placed worker, and after a refusal to each of the others."""
        ticket = await asyncio.shield(self._ticket)  # cancelling this leg must not cancel the future itself
        worker, arrived, refused = self._placed.placement.decode, self._placed.decode_arrived, list[Worker]()
        with ExitStack() as counted:
            while True:
                try:
                    await self._decode_on(worker, ticket, arrived)
                    return
                except TandemError as error:
                    refused.insert(0, worker)
                    another = self._another(refused) if error.reason in REFUSALS and Hop.HANDOFF not in self.passed else None
                    if another is None:
                        raise self._decode_failed(refused, error) from error
                arrived()
                worker = another
                arrived = counted.enter_context(self._fleet.ledger.sending(worker.address, len(self._token_ids)))

    def _another(self, refused: Sequence[Worker]) -> Worker | None:
        return self._fleet.another_decode(self._job, len(self._token_ids), self._placed.placement.prefill, refused)

    def _decode_failed(self, asked: list[Worker], error: TandemError) -> HopFailed:
        if error.reason in HANDOFF_BREAKS:
            held = not self._first_token.is_set()
            return HopFailed(Hop.HANDOFF, (asked[0], self._placed.placement.prefill), error, held)
        workers = asked if error.reason in REFUSALS else asked[:1]
        return HopFailed(Hop.DECODE, tuple(workers), error, held=Hop.DECODE in self._held)

    async def _decode_on(self, worker: Worker, ticket: kv_pb2.KvTicket, arrived: Callable[[], None]) -> None:
        self._decode_worker = worker
        self._held.discard(Hop.DECODE)
        with await self._take_turn(Hop.DECODE, worker) as turn:
            await self._decode_in_turn(worker, ticket, arrived, turn)

    async def _decode_in_turn(self, worker: Worker, ticket: kv_pb2.KvTicket, arrived: Callable[[], None], turn: Turn) -> None:
        stub = decode_pb2_grpc.DecodeServiceStub(self._fleet.channel(worker))  # type: ignore[no-untyped-call]
        inflow = self._inflow = Inflow(lambda index, tokens: self._on_tokens(index, tokens, turn))
        if self._first_token.is_set():
            inflow.open()
        with self._fleet.route(worker, inflow) as route:
            request = decode_request(self._job, self._number, self._token_ids, ticket, (route.follower_id, route.stream_number))
            call = stub.Decode(request, timeout=self._underway.remaining_s, metadata=call_metadata())
            inflow.stop = call.cancel
            try:
                with self._fleet.holding(worker, call):
                    await self._read_decode(call, inflow, turn, arrived)
            except TandemError as error:
                raise inflow.failure or error from None
            finally:
                turn.end()
                await end(call)
                self._inflow = None  # it holds this attempt: without a cycle, all of a request is freed when it ends

    async def _read_decode(self, call: grpc.aio.UnaryStreamCall, inflow: Inflow, turn: Turn, arrived: Callable[[], None]) -> None:
        while (event := await read(call)) is not None:
            arrived()
            await self._on_decode(event, inflow, turn)
            if self._completion.cut_short:
                return
            if event.WhichOneof("event") == "finished":
                await _over(call)
                return
        raise TandemError(Reason.INTERNAL, "the decode worker ended its stream before the completion had ended")

    async def _on_decode(self, event: decode_pb2.DecodeResponse, inflow: Inflow, turn: Turn) -> None:
        match event.WhichOneof("event"):
            case "reserved":
                self._held.add(Hop.DECODE)
            case "kv_ready":
                self._timeline.kv_ready()
                self.passed.add(Hop.HANDOFF)
                self._fleet.handed_over(self._placed.placement.prefill, self._decode_worker)
                self._handoff = Handoff(event.kv_ready.transport, event.kv_ready.pulled_bytes)
            case "delta":
                await self._first_token.wait()
                await self._completion.room()
                self._on_tokens(event.delta.index, tokens_from(event.delta.tokens), turn)
            case "finished":
                await self._first_token.wait()
                num_tokens = event.finished.num_tokens
                await inflow.until(lambda: self._completion.finished is not None or self._completion.num_tokens >= num_tokens)
                self._timeline.decode_queue_us = event.finished.queue_us

    def _on_tokens(self, index: int, tokens: Sequence[Token], turn: Turn) -> bool:
        """Says whether the worker has to go on: it knows nothing of stop strings."""
        self._held.add(Hop.DECODE)  # followed tokens may be faster than what the call itself says
        self._completion.push(index, tokens)
        self.passed |= {Hop.HANDOFF, Hop.DECODE}
        turn.end()
        return not self._completion.cut_short

    def _ending(self) -> Ending:
        completion = self._completion
        if completion.finished is None:
            error = TandemError(Reason.INTERNAL, f"the workers ended after {completion.num_tokens} tokens without a reason")
            raise HopFailed(Hop.DECODE, (self._placed.placement.decode,), error, held=True)
        timings = self._timeline.timings()
        return Ending(completion.finished, completion.num_cached_tokens, completion.num_tokens, timings, self._handoff)


async def _over(call: grpc.aio.UnaryStreamCall) -> None:
    """Takes the status that follows the last message. To cancel a call at its end costs both sides more."""
    with contextlib.suppress(TandemError):  # nothing that could fail any more
        await read(call)


def _refused(leg: asyncio.Task[None]) -> bool:
    failure = leg.exception() if leg.done() else None
    return isinstance(failure, HopFailed) and failure.refused

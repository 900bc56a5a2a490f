"""Two legs, prefill and decode, become one completion. The only place that decides what a worker's failure means to the user."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc

from gateway.calls import cancel_and_wait, end, read, see_through
from gateway.completion import Completion
from gateway.job import Ending, GenerationJob, Handoff
from gateway.routing import Placed, PlacementLedger, Role, Worker, choose, choose_decode, largest_decode_pool, usable
from gateway.timeline import Timeline
from gateway.wire import decode_request, prefill_request, tokens_from
from gateway.workers import WorkerDirectory
from tandem.channels import call_metadata
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 1.0
# A ticket that the worker has sent already is here by then.
TICKET_UNDER_WAY_S = 0.1
# How long a finished completion waits for workers to say where their time went; they do so at once unless they are stuck.
LAST_WORDS_S = 0.5

# A decode worker that says one of these before it has reserved blocks leaves the ticket as it was.
_REFUSALS = frozenset({Reason.QUEUE_FULL, Reason.KV_BLOCKS_EXHAUSTED, Reason.POOL_TOO_SMALL, Reason.DRAINING, Reason.LOADING})
# The worker, or what it held for the request, is gone.
_LOSSES = frozenset(
    {
        Reason.WORKER_LOST,
        Reason.ENGINE_FAILED,
        Reason.TICKET_NOT_FOUND,
        Reason.KV_CHECKSUM_MISMATCH,
        Reason.TRANSFER_INTERRUPTED,
        Reason.CANCELLED,
        Reason.STREAM_BROKEN,
        Reason.UNKNOWN_SERVICE,
        Reason.UNIMPLEMENTED,
    }
)


class Relay:
    """Runs requests on placed workers. Used on the event loop; `close` once."""

    def __init__(self, directory: WorkerDirectory, ledger: PlacementLedger) -> None:
        self.directory = directory
        self.ledger = ledger
        self._releases: set[asyncio.Task[None]] = set()

    @contextmanager
    def place(self, job: GenerationJob) -> Iterator[Placed]:
        """Chooses workers and counts the request at them. Raises NO_WORKER."""
        num_tokens = len(job.token_ids)
        placement = choose(self.directory.workers, job.model_digest, num_tokens, self.ledger)
        with self.ledger.placed(placement, num_tokens) as placed:
            yield placed

    def pool_tokens(self, model_digest: str) -> int | None:
        """Most tokens that a decode worker can hold for one request, as far as is known now."""
        return largest_decode_pool(self.directory.workers, model_digest)

    async def run(self, job: GenerationJob, placed: Placed, completion: Completion, timeline: Timeline) -> Ending:
        """Feeds `completion` until it has ended. Cancelling ends both legs. Raises what the user is to see."""
        attempt = _Attempt(self, job, placed, completion, timeline)
        try:
            return await attempt.run()
        except TandemError as error:
            raise user_error(error, completion.num_tokens) from error

    def release_soon(self, worker: Worker, ticket: kv_pb2.KvTicket) -> None:
        """Gives up a ticket that nobody will pull, so that its blocks need not wait for the lease to end."""
        task = asyncio.create_task(self._release(worker, ticket))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Waits for releases under way."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _release(self, worker: Worker, ticket: kv_pb2.KvTicket) -> None:
        request = kv_pb2.ReleaseRequest(ticket_id=ticket.ticket_id, epoch=ticket.epoch)
        try:
            stub = kv_pb2_grpc.KvTransferServiceStub(self.directory.channel(worker.address))  # type: ignore[no-untyped-call]
            await stub.Release(request, timeout=RELEASE_TIMEOUT_S)
        except (grpc.aio.AioRpcError, KeyError) as error:
            logger.info("a ticket of %s was not released and will expire: %s", worker.address, error)


class _Attempt:
    """One try at a request: a prefill leg and, unless the first token ends it, a decode leg.

    A later attempt would prefill the prompt and what `completion` already has, under a higher number, and go on from there.
    """

    def __init__(self, relay: Relay, job: GenerationJob, placed: Placed, completion: Completion, timeline: Timeline) -> None:
        self._relay = relay
        self._job = job
        self._placed = placed
        self._completion = completion
        self._timeline = timeline
        self._number = 1
        self._token_ids: Sequence[int] = [*job.token_ids, *completion.token_ids]
        self._first_token_only = job.stopping.max_tokens - completion.num_tokens == 1
        self._ticket: asyncio.Future[kv_pb2.KvTicket] = asyncio.get_running_loop().create_future()
        self._first_token = asyncio.Event()
        self._num_cached_tokens = 0
        self._handoff: Handoff | None = None

    async def run(self) -> Ending:
        """The first leg to fail ends the other; so does the completion's end, after which no leg can fail it any more."""
        legs = [asyncio.create_task(self._prefill())]
        if not self._first_token_only:
            legs.append(asyncio.create_task(self._decode()))
        try:
            await self._until_finished(legs)
            # Only timings are still to come, and those of a decode leg that has not begun are of no interest.
            await asyncio.wait(legs[:1] if self._handoff is None else legs, timeout=LAST_WORDS_S)
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
                if self._completion.finished is None:
                    for leg in done:
                        leg.result()
        finally:
            await cancel_and_wait(finishing)

    async def _end(self, prefill: asyncio.Task[None], *decode: asyncio.Task[None]) -> None:
        """Ends both legs. A quick prefill may be over before its ticket is here, and its blocks would wait for the lease to end."""
        await cancel_and_wait(*decode)
        if not self._first_token_only:
            await asyncio.wait((prefill, self._ticket), timeout=TICKET_UNDER_WAY_S, return_when=asyncio.FIRST_COMPLETED)
        await cancel_and_wait(prefill)
        self._release_unless_pulled()

    async def _prefill(self) -> None:
        worker = self._placed.placement.prefill
        request = prefill_request(self._job, self._number, self._token_ids, self._first_token_only)
        stub = prefill_pb2_grpc.PrefillServiceStub(self._channel(worker))  # type: ignore[no-untyped-call]
        call = stub.Prefill(request, timeout=self._remaining_s(), metadata=call_metadata())
        try:
            while (event := await read(call)) is not None:
                self._placed.prefill_arrived()
                self._on_prefill(event)
        except TandemError:
            # With the first token here, all depends on the decode leg, which knows best whether it has its blocks.
            if not self._first_token.is_set():
                raise
        finally:
            await end(call)
        if not self._first_token.is_set():
            raise TandemError(Reason.INTERNAL, "the prefill worker ended its stream without a first token")

    def _on_prefill(self, event: prefill_pb2.PrefillResponse) -> None:
        match event.WhichOneof("event"):
            case "admitted":
                self._num_cached_tokens = event.admitted.cached_tokens
                if event.admitted.HasField("ticket") and not self._ticket.done():
                    self._ticket.set_result(event.admitted.ticket)
            case "first_token" if not self._first_token.is_set():
                self._on_first_token(event.first_token)
            case "done":
                self._timeline.prefill_queue_us = event.done.queue_us

    def _on_first_token(self, event: prefill_pb2.FirstToken) -> None:
        completion, output = self._completion, self._job.output
        self._timeline.first_token()
        if completion.num_tokens == 0 and (output.echo or output.num_prompt_logprobs is not None):
            completion.give_prompt(tokens_from(event.prompt_logprobs))
        completion.push(completion.num_tokens, tokens_from((event.token,)))
        self._first_token.set()

    async def _decode(self) -> None:
        """Offers the ticket to the placed worker, and after a refusal to each of the others."""
        ticket = await asyncio.shield(self._ticket)  # cancelling this leg must not cancel the future itself
        worker, arrived, refused = self._placed.placement.decode, self._placed.decode_arrived, set[str]()
        with ExitStack() as counted:
            while True:
                try:
                    await self._decode_on(worker, ticket, arrived)
                    return
                except TandemError as error:
                    refused.add(worker.address)
                    another = self._another_decode(refused)
                    if error.reason not in _REFUSALS or self._handoff is not None or another is None:
                        raise
                arrived()
                worker = another
                arrived = counted.enter_context(self._relay.ledger.sending(worker.address, len(self._token_ids)))

    def _another_decode(self, refused: set[str]) -> Worker | None:
        layout = self._placed.placement.prefill.layout
        workers = usable(self._relay.directory.workers, Role.DECODE, self._job.model_digest, without=refused)
        fitting = [worker for worker in workers if worker.layout == layout]
        return choose_decode(fitting, layout, len(self._token_ids), self._relay.ledger) if fitting else None

    async def _decode_on(self, worker: Worker, ticket: kv_pb2.KvTicket, arrived: Callable[[], None]) -> None:
        request = decode_request(self._job, self._number, self._token_ids, ticket)
        stub = decode_pb2_grpc.DecodeServiceStub(self._channel(worker))  # type: ignore[no-untyped-call]
        call = stub.Decode(request, timeout=self._remaining_s(), metadata=call_metadata())
        try:
            while (event := await read(call)) is not None:
                arrived()
                await self._on_decode(event)
                if self._completion.cut_short or event.WhichOneof("event") == "finished":
                    return
        finally:
            await end(call)
        raise TandemError(Reason.INTERNAL, "the decode worker ended its stream before the completion had ended")

    async def _on_decode(self, event: decode_pb2.DecodeResponse) -> None:
        match event.WhichOneof("event"):
            case "kv_ready":
                self._timeline.kv_ready()
                self._handoff = Handoff(event.kv_ready.transport, event.kv_ready.pulled_bytes)
            case "delta":
                await self._first_token.wait()
                await self._completion.room()
                self._completion.push(event.delta.index, tokens_from(event.delta.tokens))
            case "finished":
                await self._first_token.wait()
                self._timeline.decode_queue_us = event.finished.queue_us

    def _ending(self) -> Ending:
        completion = self._completion
        if completion.finished is None:
            raise TandemError(Reason.INTERNAL, f"the workers ended after {completion.num_tokens} tokens without a reason")
        timings = self._timeline.timings()
        return Ending(completion.finished, self._num_cached_tokens, completion.num_tokens, timings, self._handoff or Handoff())

    def _release_unless_pulled(self) -> None:
        if self._ticket.done() and self._handoff is None:
            self._relay.release_soon(self._placed.placement.prefill, self._ticket.result())

    def _remaining_s(self) -> float:
        return max(self._job.deadline - time.monotonic(), 0.0)

    def _channel(self, worker: Worker) -> grpc.aio.Channel:
        try:
            return self._relay.directory.channel(worker.address)
        except KeyError:
            raise TandemError(Reason.WORKER_LOST, f"worker {worker.address} is no longer known") from None


def user_error(error: TandemError, num_tokens: int) -> TandemError:
    """What a leg's failure means to the user, who has `num_tokens` tokens: with tokens out, no client may simply ask again."""
    lost = error.reason in _LOSSES
    metadata = {**error.metadata, "cause": error.reason.value}
    if num_tokens and (lost or error.retry_after_s is not None):
        metadata["tokens_delivered"] = str(num_tokens)
        message = f"the completion broke off after {num_tokens} tokens: {error.message}"
        return TandemError(Reason.STREAM_BROKEN, message, metadata=metadata)
    if lost:
        return TandemError(Reason.WORKER_LOST, f"a worker was lost before the first token: {error.message}", metadata=metadata)
    return error

"""The workers as attempts use them: chosen, called, watched while they hold a request, and remembered when they fail it."""

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from gateway.ejection import Ejector
from gateway.failover import HopFailed, Loss, Recovery
from gateway.followers import Followers, Inflow, Route
from gateway.job import GenerationJob
from gateway.links import Links
from gateway.routing import Placement, PlacementLedger, Role, Wishes, Worker, choose, choose_decode, partners_of, usable
from gateway.workers import WorkerDirectory
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import kv_pb2, kv_pb2_grpc

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 1.0


class Fleet:
    """Joins the live view, what was sent since, and who has failed lately. Used on the event loop; `close` once."""

    def __init__(self, directory: WorkerDirectory, ledger: PlacementLedger, ejector: Ejector, links: Links) -> None:
        self._directory = directory
        self._ejector = ejector
        self._links = links
        self._followers = Followers()
        self._releases: set[asyncio.Task[None]] = set()
        self.ledger = ledger

    @property
    def workers(self) -> Collection[Worker]:
        return self._directory.workers

    def place(self, job: GenerationJob, num_tokens: int, recovery: Recovery) -> Placement:
        """The best pair for what is left of a request. Raises NO_WORKER."""
        placement = choose(self.workers, job.model_digest, num_tokens, self.ledger, self._wishes(recovery))
        self._links.chosen(placement.pair)
        return placement

    def another_decode(self, job: GenerationJob, num_tokens: int, prefill: Worker, refused: Collection[Worker]) -> Worker | None:
        """The best decode worker for a ticket that others have refused."""
        without = {worker.address for worker in refused}
        partners = partners_of(prefill, usable(self.workers, Role.DECODE, job.model_digest, without))
        if not partners:
            return None
        wishes = Wishes(avoided=self._ejected(), avoided_pairs=self._links.avoided)
        decode = choose_decode(prefill, partners, num_tokens, self.ledger, wishes)
        self._links.chosen((prefill.worker_id, decode.worker_id))
        return decode

    def handed_over(self, prefill: Worker, decode: Worker) -> None:
        """Blocks have come across."""
        self._links.passed((prefill.worker_id, decode.worker_id))

    def channel(self, worker: Worker) -> grpc.aio.Channel:
        """Raises WORKER_LOST if the worker is not known any more."""
        try:
            return self._directory.channel(worker.address)
        except KeyError:
            raise TandemError(Reason.WORKER_LOST, f"worker {worker.address} is no longer known") from None

    @contextmanager
    def holding(self, worker: Worker, call: grpc.aio.UnaryStreamCall) -> Iterator[None]:
        """Ends the call if the worker is lost meanwhile, which reading it then raises as WORKER_LOST."""
        with self._directory.while_known(worker, call.cancel):
            yield

    @contextmanager
    def route(self, worker: Worker, inflow: Inflow) -> Iterator[Route]:
        """How the deltas of one stream come from a decode worker."""
        with self._followers.route(worker, inflow) as route:
            yield route

    def follow(self, address: str) -> None:
        """A worker has been heard of; a decode worker that serves is followed."""
        for worker in self.workers:
            if worker.address == address and worker.role is Role.DECODE and worker.ready:
                self._followers.follow(worker, self.channel(worker), self.holding)

    def follows(self, worker: Worker) -> bool:
        return self._followers.live(worker)

    def failed(self, failure: HopFailed) -> Loss:
        """A worker that broke a request is not used before it has spoken again, and no pair before a while has passed. Returns what
        is known of the end of the one that is suspected to have died."""
        culprit = failure.workers[0]
        if failure.pair is not None:
            self._links.broke(failure.pair)
        elif failure.broken:
            self._directory.doubt(culprit)
            self._ejector.failed(culprit.address)
        if failure.suspected is None or failure.told:
            return Loss(ended=False)
        _, suspect = failure.suspected
        return self._directory.losses.of(suspect.worker_id)

    async def settled(self, *losses: Loss) -> None:
        """Waits until it is known of each whether the worker has died; not for ever."""
        await self._directory.losses.settled(*losses)

    def release_soon(self, worker: Worker, ticket: kv_pb2.KvTicket) -> None:
        """Gives up a ticket that nobody will pull, so that its blocks need not wait for the lease to end."""
        task = asyncio.create_task(self._release(worker, ticket))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Ends what is open for no request, and waits for releases under way."""
        await self._followers.close()
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _release(self, worker: Worker, ticket: kv_pb2.KvTicket) -> None:
        request = kv_pb2.ReleaseRequest(ticket_id=ticket.ticket_id, epoch=ticket.epoch)
        try:
            stub = kv_pb2_grpc.KvTransferServiceStub(self.channel(worker))  # type: ignore[no-untyped-call]
            await stub.Release(request, timeout=RELEASE_TIMEOUT_S)
        except (grpc.aio.AioRpcError, TandemError) as error:
            logger.info("a ticket of %s was not released and will expire: %s", worker.address, error)

    def _wishes(self, recovery: Recovery) -> Wishes:
        tried = {worker.address for worker in self.workers if worker.worker_id in recovery.tried}
        avoided = {worker.address for worker in self.workers if worker.worker_id in recovery.avoided}
        return Wishes(
            tried, avoided | self._ejected(), recovery.prefill_address, frozenset(recovery.tried_pairs), self._links.avoided
        )

    def _ejected(self) -> set[str]:
        return {worker.address for worker in self.workers if self._ejector.ejected(worker.address)}

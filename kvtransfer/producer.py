"""The producing side of the hand-off: grants tickets, tells readers what is ready, and frees blocks when their lease is over."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvtransfer.blocks import MakeBlocks, blocks_of
from kvtransfer.choice import offerable
from kvtransfer.counters import ProducerCounters
from kvtransfer.heart_server import HeartServer
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.kv_server import KvServer
from kvtransfer.ledger import TicketLedger, not_found
from kvtransfer.links import Links
from kvtransfer.offers import offer_for
from kvtransfer.outbox import Checksummer, Outbox, Reading
from kvtransfer.pulse import Pulse
from kvtransfer.staging import stage_of
from kvtransfer.states import State
from kvtransfer.ticket import TRANSPORTS, BlockFence, HeartbeatPort, KvPort, KvTicket, TransportOffer, check_names
from llm.kv.block_arrays import BlockIds
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError
from tandem.progress import Work

logger = logging.getLogger(__name__)

SILENT_S = 1.5
"""A consumer that has beaten and falls silent for so long is lost: its streams end. Its lease runs on, for another may pull."""
WATCH_S = 0.25


@dataclass(frozen=True)
class ProducerIdentity:
    """Who grants the tickets. `address`: where the KvTransferService listens."""

    producer_id: str
    model_digest: str
    tokenizer_digest: str
    address: str


class KvProducer:
    """Lives on the event loop: every method is called there, and so is `free(block_ids)`, once per ticket.

    `transports` is what it offers, best first; `kv_host` the interface that the tcp transport and the heartbeat listen on.
    """

    def __init__(
        self,
        pool: KvPool,
        identity: ProducerIdentity,
        *,
        lease_s: float,
        free: Callable[[Sequence[int]], None],
        clock: Callable[[], float] = time.monotonic,
        transports: Sequence[str] = TRANSPORTS,
        kv_host: str = "127.0.0.1",
        kv_advertised_host: str | None = None,
        heart: Callable[[Pulse, str, str], HeartServer] = HeartServer,
        make_blocks: MakeBlocks = blocks_of,
    ) -> None:
        self.identity = identity
        self.transports = offerable(check_names(transports), pool)
        self.block_tokens = pool.layout.block_tokens
        self.block_bytes = pool.layout.block_bytes
        self._pool = pool
        self._lease_s = lease_s
        self._clock = clock
        self._ledger = TicketLedger(clock, lease_s, free)
        self._outboxes: dict[str, Outbox] = {}
        blocks = make_blocks(pool)
        self._checksummer = Checksummer(blocks, self._fail)
        self._stage = stage_of(blocks)
        self.links = None if isinstance(blocks, HostBlocks) else Links(blocks)
        self._server = KvServer(self._stage, pool.layout.block_bytes, self, kv_host, sends_blocks="tcp" in transports)
        self._heart = heart(self._ledger.pulse, identity.producer_id, kv_host)
        self._heartbeat: HeartbeatPort | None = None
        self._port: KvPort | None = None
        self._advertised_host = kv_advertised_host or kv_host
        self._offers: tuple[TransportOffer, ...] = ()
        self._expiry: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._num_readers = 0
        self._num_silenced = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Listens for consumers; before the first grant."""
        await self._checksummer.warm()
        self._heartbeat = HeartbeatPort(self._advertised_host, await asyncio.to_thread(self._heart.start))
        self._port = KvPort(self._advertised_host, await self._server.start())
        self._offers = tuple(offer_for(name, self._pool, self._port) for name in self.transports)

    @property
    def num_outstanding(self) -> int:
        """Tickets whose blocks have not been freed."""
        return self._ledger.num_outstanding

    @property
    def num_moves(self) -> int:
        """How often a ticket has come nearer to its end, or its consumer has asked for more time."""
        return self._ledger.num_moves

    def counters(self) -> ProducerCounters:
        ledger, ended = self._ledger, self._ledger.num_ended
        return ProducerCounters(
            granted=ledger.num_granted,
            released=ended[State.RELEASED],
            expired=ended[State.EXPIRED],
            aborted=ended[State.ABORTED],
            stale=ledger.num_stale,
            silenced=self._num_silenced,
            refused_connections=self._heart.num_refused + self._server.num_refused,
        )

    def work(self) -> Work:
        """Whether blocks are being made ready for consumers, and how far that is."""
        return self._checksummer.work()

    def grant(self, epoch: int, num_tokens: int, block_ids: Sequence[int]) -> KvTicket:
        """A ticket for blocks that will hold `num_tokens` tokens; takes over one reference to each block."""
        assert len(block_ids) == self._pool.layout.blocks_for(num_tokens), "the blocks do not fit the tokens"
        identity = self.identity
        ticket = KvTicket(
            ticket_id=secrets.token_hex(16),
            epoch=epoch,
            producer_id=identity.producer_id,
            model_digest=identity.model_digest,
            tokenizer_digest=identity.tokenizer_digest,
            layout=self._pool.layout,
            num_tokens=num_tokens,
            block_ids=tuple(block_ids),
            lease_ms=round(self._lease_s * 1000),
            offers=self._offers,
            address=identity.address,
            heartbeat=self._heartbeat,
            fence=self._fence(block_ids),
            kv_port=self._port,
        )
        self._outboxes[ticket.ticket_id] = Outbox(self._ledger.grant(ticket.ticket_id, epoch, block_ids))
        self._idle.clear()
        return ticket

    def progress(self, ticket_id: str, num_ready_blocks: int) -> None:
        """The ticket's first `num_ready_blocks` blocks will not change any more."""
        if self._ledger.progress(ticket_id, num_ready_blocks) is not None:
            self._tell(self._outboxes[ticket_id])

    def finish(self, ticket_id: str, first_token_id: int) -> None:
        """All blocks are ready and the first token is drawn; the lease begins to run."""
        if self._ledger.finish(ticket_id, first_token_id) is not None:
            self._tell(self._outboxes[ticket_id])
            self._watch_leases()

    def _tell(self, outbox: Outbox) -> None:
        """Readers come first: their consumers copy while checksums are taken here."""
        outbox.notify()
        asyncio.get_running_loop().call_soon(self._checksummer.submit, outbox)

    def abort(self, ticket_id: str, error: TandemError) -> None:
        """Ends a ticket that will not be filled; whoever waits for it gets `error`. Idempotent."""
        self._ledger.abort(ticket_id, error)
        self._changed(ticket_id)

    def release(self, ticket_id: str, epoch: int) -> None:
        """The consumer has what it needs. Idempotent. Raises TICKET_NOT_FOUND for another epoch than the ticket's."""
        self._ledger.release(ticket_id, epoch)
        self._changed(ticket_id)

    def block_ids(self, ticket_id: str, epoch: int) -> BlockIds:
        """A ticket's blocks; its own only until it is over, as `check` tells. Raises TICKET_NOT_FOUND."""
        self.check(ticket_id, epoch)
        return self._outboxes[ticket_id].block_ids

    def ready_blocks(self, ticket_id: str, epoch: int) -> BlockIds:
        """Those that readers may know of. Raises TICKET_NOT_FOUND."""
        block_ids = self.block_ids(ticket_id, epoch)
        return block_ids[: self._outboxes[ticket_id].entry.num_ready_blocks]

    def is_outstanding(self, ticket_id: str) -> bool:
        """Whether the ticket's blocks have not been freed."""
        return self._ledger.get(ticket_id) is not None

    def check(self, ticket_id: str, epoch: int) -> None:
        """Whoever sends blocks asks before each piece, and without giving way between the answer and the sending.

        Raises TICKET_NOT_FOUND if the ticket is over: its blocks may be another's by now.
        """
        if self._ledger.get(ticket_id) is None:
            raise not_found(ticket_id, epoch, "over")

    @contextmanager
    def reading(self, ticket_id: str, epoch: int, first_block_index: int) -> Iterator[Reading]:
        """What becomes ready of a ticket from `first_block_index` on.

        The context is to be left without an error only when everything was told; its being open keeps no lease alive. What it gives
        raises TRANSFER_INTERRUPTED for a consumer that has fallen silent, or the error given to `abort`. Raises TICKET_NOT_FOUND,
        and INVALID_REQUEST for an index beyond the ticket.
        """
        entry = self._ledger.open(ticket_id, epoch)
        outbox = self._outboxes[ticket_id]
        outbox.silenced = None
        self._count_reader(1)
        try:
            if not 0 <= first_block_index <= len(entry.block_ids):
                raise TandemError(Reason.INVALID_REQUEST, f"the ticket has {len(entry.block_ids)} blocks, not {first_block_index}")
            with outbox.reading(first_block_index) as reading:
                yield reading
            self._ledger.pulled(entry)
        finally:
            self._ledger.close(entry)
            self._count_reader(-1)

    def expire_leases(self) -> None:
        """Ends the tickets whose lease is over. A timer calls this when the next is due."""
        for entry in self._ledger.expire():
            self._changed(entry.ticket_id)
        self._unwatch_leases()
        self._watch_leases()

    async def wait_idle(self) -> None:
        """Returns once no ticket is outstanding."""
        await self._idle.wait()

    async def close(self) -> None:
        """Ends all tickets and frees their blocks; nothing may be granted any more."""
        for ticket_id in self._ledger.ticket_ids:
            self.abort(ticket_id, TandemError(Reason.DRAINING, "the prefill worker is shutting down"))
        await self._server.close()
        self._unwatch_leases()
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self._heart.close)
        await self._checksummer.close()
        await self._stage.close()
        if self.links is not None:
            await self.links.close()

    def _fence(self, block_ids: Sequence[int]) -> BlockFence | None:
        table = self._pool.generations
        return None if table.shared is None else BlockFence(table.shared, table.of(block_ids))

    def _changed(self, ticket_id: str) -> None:
        """Wakes the ticket's readers, and forgets a ticket that the ledger has done with."""
        outbox = self._outboxes.get(ticket_id)
        if outbox is None:
            return
        outbox.notify()
        if self._ledger.get(ticket_id) is None:
            del self._outboxes[ticket_id]
        if not self._outboxes:
            self._idle.set()

    def _watch_leases(self) -> None:
        """Renewals only move expiry back, so one timer at the earliest moment is enough."""
        moment = self._ledger.next_expiry
        if self._expiry is None and moment is not None:
            self._expiry = asyncio.get_running_loop().call_later(max(0.0, moment - self._clock()), self.expire_leases)

    def _unwatch_leases(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _count_reader(self, change: int) -> None:
        self._num_readers += change
        if self._num_readers and self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(WATCH_S, self._watch_readers)

    def _watch_readers(self) -> None:
        """Ends the streams of consumers that are lost: such a stream may stand for ever, since a frozen peer's kernel answers."""
        self._watch = None
        for entry in self._ledger.silent(SILENT_S):
            outbox = self._outboxes[entry.ticket_id]
            if outbox.silenced is not None:
                continue
            logger.warning("%s: its consumer has fallen silent", entry)
            self._num_silenced += 1
            outbox.silenced = TandemError(Reason.TRANSFER_INTERRUPTED, "the consumer has fallen silent")
            outbox.notify()
        self._count_reader(0)

    def _fail(self, outbox: Outbox, error: BaseException) -> None:
        logger.error("%s: no checksum", outbox.entry, exc_info=error)
        self.abort(outbox.entry.ticket_id, TandemError(Reason.INTERNAL, "the blocks' checksums could not be taken"))

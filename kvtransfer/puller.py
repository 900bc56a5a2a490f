"""The consuming side of the hand-off: fetches a ticket's blocks into blocks of the own pool."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc.aio

from kvtransfer.blocks import MakeBlocks, blocks_of
from kvtransfer.choice import Chooser, TransportChoice, offer_of
from kvtransfer.connections import Answer
from kvtransfer.counters import PullCounters, PullTally
from kvtransfer.destination import Destination, Recipient
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.intake import Crew, Pull
from kvtransfer.lifeline import Lifeline
from kvtransfer.peers import Lifelines, Peer, Peers
from kvtransfer.pull_state import DamagedBlockError, InterruptedPullError, PulledTickets, PullState
from kvtransfer.staging import stage_of
from kvtransfer.states import State
from kvtransfer.threads import WatchedThreads
from kvtransfer.ticket import TRANSPORTS, KvPort, KvTicket, TcpOffer, check_names
from kvtransfer.transports import mapped, tcp
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.errors import Reason, TandemError
from tandem.progress import Work

logger = logging.getLogger(__name__)

THREADS = 2


@dataclass(frozen=True)
class PullResult:
    """All blocks are here and verified. `pull_us`: from the first frame until then; `num_refetched`: blocks that came damaged."""

    first_token_id: int
    transport: str
    num_bytes: int
    pull_us: int
    num_refetched: int
    num_resumed: int = 0
    """Times the transfer was cut and taken up again."""


class KvPuller:
    """Lives on the event loop; copying and checksums run in threads of its own. `transports`: those it may use, best first."""

    def __init__(
        self,
        pool: KvPool,
        layout: KvLayout,
        model_digest: str,
        tokenizer_digest: str,
        *,
        channels: Callable[[str], grpc.aio.Channel],
        transports: Sequence[str] = TRANSPORTS,
        lifelines: Lifelines = Lifeline,
        clock: Callable[[], float] = time.monotonic,
        make_blocks: MakeBlocks = blocks_of,
    ) -> None:
        self._layout = layout
        self._model_digest = model_digest
        self._tokenizer_digest = tokenizer_digest
        self._blocks = make_blocks(pool)
        self._stage = stage_of(self._blocks)
        self._threads = WatchedThreads(THREADS, "kv-pull")
        self._peers = Peers(channels, lifelines, self._threads)
        self._clock = clock
        self._tally = PullTally()
        self._pulled = PulledTickets(clock)
        self._chooser = Chooser(check_names(transports), pool, self._blocks, self._peers)
        self._warming = self._blocks.warm_up(self._threads, THREADS)

    async def start(self) -> None:
        """Before the first pull, if that is to be as quick as the others."""
        await asyncio.gather(*map(asyncio.wrap_future, self._warming))

    @property
    def transports(self) -> tuple[str, ...]:
        """Those that can reach this pool, best first."""
        return tuple(self._chooser.usable)

    def check(self, ticket: KvTicket) -> None:
        """Raises MODEL_MISMATCH or KV_LAYOUT_MISMATCH for a ticket whose blocks would mean something else here."""
        for name, own in (("model_digest", self._model_digest), ("tokenizer_digest", self._tokenizer_digest)):
            theirs = getattr(ticket, name)
            if theirs != own:
                message = f"the ticket's {name} is {theirs[:12]}, this worker's is {own[:12]}"
                raise TandemError(Reason.MODEL_MISMATCH, message, metadata={name: theirs})
        if ticket.layout != self._layout:
            raise TandemError(Reason.KV_LAYOUT_MISMATCH, f"the ticket's blocks are {ticket.layout}, this worker's {self._layout}")
        if ticket.kv_port is None:
            raise TandemError(Reason.KV_LAYOUT_MISMATCH, "the prefill worker is of an earlier version, whose hand-off is another")
        needed = self._layout.blocks_for(ticket.num_tokens)
        if len(ticket.block_ids) != needed:
            message = f"the ticket has {len(ticket.block_ids)} blocks; {ticket.num_tokens} tokens take {needed}"
            raise TandemError(Reason.KV_LAYOUT_MISMATCH, message)

    async def choose(self, ticket: KvTicket) -> TransportChoice:
        """The best transport that both sides have and that works. FAILED_PRECONDITION (KV_LAYOUT_MISMATCH) if there is none."""
        with self._peers.using(ticket) as peer:
            return await self._choose(ticket, peer)

    async def pull(self, ticket: KvTicket, block_ids: Sequence[int], recipient: Recipient | None = None) -> PullResult:
        """Fetches the ticket's blocks into `block_ids`, one for each, while the producer still computes them.

        However this ends, also by being cancelled, nothing touches the blocks any more once it has. What `recipient` is told before
        that holds only if it ends well.
        Raises what `check` and `choose` raise; TICKET_NOT_FOUND or the error of the producer that ended the ticket;
        KV_CHECKSUM_MISMATCH for a block that came damaged three times; TRANSFER_INTERRUPTED if the transfer was cut twice, or the
        producer fell silent.
        """
        self.check(ticket)
        assert len(block_ids) == len(ticket.block_ids), "one block for each of the ticket's"
        state = PullState(ticket.ticket_id, ticket.epoch, len(block_ids), self._clock)
        try:
            with self._peers.using(ticket) as peer:
                choice, first_token_id = await self._pull(ticket, peer, Destination(block_ids, state, recipient))
        except TandemError as error:
            if error.reason is Reason.TICKET_NOT_FOUND:
                state.expire()
            raise
        finally:
            if state.state is not State.PULLED:
                state.abort()
        self._pulled.keep(state, ticket.lease_ms / 1000)
        return self._result(choice, first_token_id, state)

    def counters(self) -> tuple[PullCounters, ...]:
        """What was pulled since the start, by producer and transport."""
        return self._tally.rows()

    def work(self) -> Work:
        """Whether blocks that are here are being taken in, and how far that is. What a producer holds up does not count."""
        return self._threads.work()

    async def release(self, ticket: KvTicket) -> None:
        """Ends the lease. Idempotent. Of a ticket that was pulled the producer hears over a KV connection, which costs both sides a
        tenth of a call. Of others by one, which raises the producer's error, or WORKER_LOST or DEADLINE_EXCEEDED."""
        pulled = self._pulled.release(ticket.ticket_id, ticket.epoch)
        with self._peers.using(ticket) as peer:
            if not (pulled and await peer.tell_released(ticket)):
                await peer.control.release(ticket)

    async def close(self) -> None:
        """No pull may run any more."""
        await self._peers.close()
        await self._stage.close()
        self._threads.shutdown()

    async def _choose(self, ticket: KvTicket, peer: Peer) -> TransportChoice:
        choice = await self._chooser.choose(ticket, peer)
        if peer.announced != str(choice):
            peer.announced = str(choice)
            logger.info("KV from producer %s comes by %s", ticket.producer_id[:8], choice)
        return choice

    async def _pull(self, ticket: KvTicket, peer: Peer, destination: Destination) -> tuple[TransportChoice, int]:
        """Attempts until one succeeds or the state allows no more; each is counted."""
        state = destination.state
        while True:
            choice = await self._choose(ticket, peer)
            with self._tally.ending(ticket.producer_id, choice.transport) as count:
                try:
                    async with peer.alive(ticket):
                        first_token_id = await self._attempt(choice, ticket, peer, destination)
                except DamagedBlockError as error:
                    count(checksum_failures=1)
                    _log(ticket, f"{error}; asking again")
                    state.damaged(error)
                    count(refetched=1)
                except InterruptedPullError as error:
                    peer.lost = True
                    _log(ticket, f"cut: {error}")
                    state.interrupted(error)
                    count(resumed=1)
                else:
                    peer.lost = False
                    count(pulled=1, pulled_blocks=state.num_verified)
                    return choice, first_token_id

    async def _attempt(self, choice: TransportChoice, ticket: KvTicket, peer: Peer, destination: Destination) -> int:
        state = destination.state
        destination.begin_attempt()
        async with Crew(destination, self._threads, self._blocks, THREADS) as crew:
            pull = Pull(ticket, destination, crew)
            connections = peer.connections(_port_of(ticket, choice.transport))
            async with connections.pulling(ticket, state.num_verified, with_blocks=choice.transport == "tcp") as answer:
                first_token_id = await self._fetch(choice.transport, peer, answer, pull)
            state.ready()
            await crew.join()
            state.pulled()
            return first_token_id

    async def _fetch(self, transport: str, peer: Peer, answer: Answer, pull: Pull) -> int:
        match transport:
            case "tcp":
                return await tcp.fetch(answer, self._stage, pull)
            case "nccl":
                assert peer.nccl is not None, "choosing nccl makes the link"
                return await peer.nccl.fetch(answer.frames(), pull)
            case _:
                assert peer.fence is not None, "choosing such a transport maps the fence"
                return await mapped.fetch(answer.frames(), self._reader(peer), peer.fence, pull)

    def _reader(self, peer: Peer) -> mapped.Reader:
        if isinstance(self._blocks, HostBlocks):
            assert peer.mapping is not None, "choosing shm maps the pool"
            return mapped.Reader(partial(peer.mapping.read, self._blocks.fetch, self._layout.block_bytes))
        assert peer.memory is not None, "choosing cuda_ipc opens the pool"
        source = self._blocks.blocks_of(peer.memory.tensor)
        return mapped.Reader(partial(self._blocks.fetch, source), partial(self._blocks.begin_fetch, source))

    def _result(self, choice: TransportChoice, first_token_id: int, state: PullState) -> PullResult:
        num_bytes = state.num_verified * self._layout.block_bytes
        pull_us = round((state.ended_at - state.began_at) * 1e6)
        return PullResult(first_token_id, choice.transport, num_bytes, pull_us, state.num_refetched, state.num_resumed)


def _port_of(ticket: KvTicket, transport: str) -> KvPort:
    offer = offer_of(ticket, TcpOffer)
    if transport == "tcp":
        assert offer is not None, "tcp is chosen only if offered"
        return KvPort(offer.host, offer.port)
    assert ticket.kv_port is not None, "a ticket without one is refused"
    return ticket.kv_port


def _log(ticket: KvTicket, what: str) -> None:
    """Takes text only: a log record that is kept must not keep an exception's views of the pools."""
    logger.warning("ticket %s epoch %d: %s", ticket.ticket_id[:8], ticket.epoch, what)

"""Protections of the product, each taken away by a name, so that the simulation can be seen to notice: `--without NAME`."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import gateway.attempt
import kvtransfer.fence
import kvtransfer.intake
import kvtransfer.ledger
import kvtransfer.mapped_file
import kvtransfer.mapping
import prefill_svc.engine
import prefill_svc.fairness
import tandem.interceptor
import tandem.pacer
from decode_svc.batcher import DecodeBatcher, Stage
from kvtransfer.mapped_file import InvisibleProcessError, UnmappableError
from kvtransfer.producer import KvProducer
from tests.simulation import threads
from tests.simulation.seams import Seams


def blocks_kept_under_a_step(seams: Seams) -> None:
    """A sequence that is closed in the middle of a step gives its blocks back at once."""

    def close(self: DecodeBatcher, sequence: Any) -> None:
        if sequence in self._sequences:
            del self._sequences[sequence]
            sequence.stage = Stage.CLOSED
            self._release(sequence)

    seams.set(DecodeBatcher, "close", close)


def resume_after_the_last_token(seams: Seams) -> None:
    """A later attempt begins one token too early, and delivers it again."""
    before = gateway.attempt.Attempt.__init__

    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        if self._num_before:
            self._token_ids = self._token_ids[:-1]

    seams.set(gateway.attempt.Attempt, "__init__", begin)


def blocks_freed_after_a_cancel(seams: Seams) -> None:
    """A prompt that is closed before it is complete keeps its blocks."""
    before = prefill_svc.engine.PrefillEngine.close

    def close(self: Any, job: Any) -> None:
        if job.prompt.complete:
            before(self, job)

    seams.set(prefill_svc.engine.PrefillEngine, "close", close)


def checksums(seams: Seams) -> None:
    """Whatever arrives counts as verified."""

    def verify(self: Any, first: Any, known: Any) -> None:
        self.state.verified(first, known)

    seams.set(kvtransfer.intake.Destination, "_verify", verify)


def generations(seams: Seams) -> None:
    """Who reads a producer's memory does not ask whether a block is still the ticket's."""

    def guard(self: Any, ticket: Any, *arguments: Any) -> Any:
        return arguments[-1]

    seams.set(kvtransfer.fence.Fence, "guard", guard)


def short_prompts_first(seams: Seams) -> None:
    """Prompts are computed in the order in which they came."""

    def share_step(sizes: Sequence[int], remaining: Sequence[int], budget: int) -> list[int]:
        shares = []
        for tokens in remaining:
            shares.append(min(tokens, budget - sum(shares)))
        return shares

    seams.set(prefill_svc.fairness, "share_step", share_step)


def leases_by_the_monotonic_clock(seams: Seams) -> None:
    """Tickets and their leases go by the wall clock."""
    before = kvtransfer.ledger.TicketLedger.__init__

    def begin(self: Any, clock: Callable[[], float], *arguments: Any) -> None:
        before(self, threads.Time.time, *arguments)

    seams.set(kvtransfer.ledger.TicketLedger, "__init__", begin)


def cancelled_calls_are_counted(seams: Seams) -> None:
    """A call that its client has cancelled counts as received, and as nothing else."""
    before = tandem.interceptor.Interceptor._serve

    async def serve(self: Any, method: str, context: Any, answer: Any) -> Any:
        counts = self.counts[method]
        try:
            return await before(self, method, context, answer)
        except asyncio.CancelledError:
            counts.cancelled -= 1
            raise

    seams.set(tandem.interceptor.Interceptor, "_serve", serve)


def pauses_are_bounded(seams: Seams) -> None:
    """The pause before a step is as long as steps are foretold to take."""
    seams.set(tandem.pacer, "_LONGEST_PAUSE_S", math.inf)


def moving_tickets_are_progress(seams: Seams) -> None:
    """A prompt that waits for blocks is stalled, whatever happens to the tickets that hold them."""
    seams.set(KvProducer, "num_moves", property(lambda self: 0))


def no_ticket_after_the_end(seams: Seams) -> None:
    """A prompt that has ended is granted a ticket of the blocks that it had."""

    def share(self: Any, job: Any) -> bool:
        with self._lock:
            self._allocator.share(job.prompt.block_ids)
        return True

    seams.set(prefill_svc.engine.PrefillEngine, "share", share)


def ended_producers_are_an_interruption(seams: Seams) -> None:
    """A producer whose memory is no more counts as one of another suite."""
    before = kvtransfer.mapped_file.map_file

    def mapped(file: Any) -> Any:
        try:
            return before(file)
        except InvisibleProcessError as error:
            raise UnmappableError(str(error)) from error

    for module in (kvtransfer.fence, kvtransfer.mapping):
        seams.set(module, "map_file", mapped)


MUTATIONS: dict[str, Callable[[Seams], None]] = {
    each.__name__: each
    for each in (
        *(blocks_kept_under_a_step, resume_after_the_last_token, blocks_freed_after_a_cancel, checksums),
        *(generations, short_prompts_first, leases_by_the_monotonic_clock, cancelled_calls_are_counted),
        *(pauses_are_bounded, moving_tickets_are_progress, no_ticket_after_the_end, ended_producers_are_an_interruption),
    )
}

"""Attempts become one completion. The only place that decides what a failure means to the user."""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.attempt import Attempt, Underway
from gateway.capacity import largest_decode_pool, seconds_ahead
from gateway.completion import Completion
from gateway.failover import LOSSES, Hop, HopFailed, Loss, Recovery
from gateway.fleet import Fleet
from gateway.isolation import Isolation, Turn
from gateway.job import Ending, GenerationJob
from gateway.quarantine import Quarantine
from gateway.routing import Placement, Worker
from gateway.spans import record_route
from gateway.timeline import Timeline
from tandem.errors import Reason, TandemError

logger = logging.getLogger(__name__)

# From the first to the longest pause between two looks for a worker.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.25


@dataclass(frozen=True)
class Patience:
    """Seconds that a request waits for a worker: one that has delivered nothing, so that its client soon hears of it, and one whose
    client would have to begin anew."""

    before_first_token_s: float = 1.0
    after_first_token_s: float = 10.0


@dataclass
class RelayCounts:
    """Since the start: attempts begun anew before the first token, and after it."""

    num_retries: int = 0
    num_migrations: int = 0


class Relay:
    """Runs requests on the fleet. Used on the event loop."""

    def __init__(
        self, fleet: Fleet, quarantine: Quarantine, patience: Patience = Patience(), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet = fleet
        self._quarantine = quarantine
        self._patience = patience
        self._clock = clock
        self._isolation = Isolation()
        self.counts = RelayCounts()

    def pool_tokens(self, model_digest: str) -> int | None:
        """Most tokens that a decode worker can hold for one request, as far as is known now."""
        return largest_decode_pool(self._fleet.workers, model_digest)

    def check(self, job: GenerationJob) -> None:
        """Raises REQUEST_QUARANTINED if workers died under this request before."""
        self._quarantine.check(job)

    def check_deadline(self, job: GenerationJob) -> None:
        """Raises DEADLINE_EXCEEDED if even half of the work that is ahead of the request in the prefill workers takes too long."""
        fleet = self._fleet
        ahead_s = seconds_ahead(fleet.workers, job.model_digest, len(job.token_ids), fleet.ledger)
        remaining_s = job.deadline - self._clock()
        if ahead_s / 2 > remaining_s:
            message = f"the prefill workers have work for {ahead_s:.1f} s before this request, which has {remaining_s:.1f} s"
            raise TandemError(Reason.DEADLINE_EXCEEDED, message)

    async def run(self, job: GenerationJob, completion: Completion, timeline: Timeline) -> Ending:
        """Feeds `completion` until it has ended. Cancelling ends what runs. Raises what the user is to see."""
        try:
            return await self._until_ended(Underway(job, completion, timeline), Recovery())
        except TandemError as error:
            if error.reason is Reason.REQUEST_QUARANTINED:
                self._quarantine.add(job)
            _forget_frames(error)
            raise user_error(error, completion.num_tokens) from error

    async def _until_ended(self, underway: Underway, recovery: Recovery) -> Ending:
        for number in itertools.count(1):
            placement = await self._place(underway, recovery, number)
            with self._fleet.ledger.placed(placement, underway.num_tokens) as placed:
                attempt = Attempt(self._fleet, underway, number, placed, functools.partial(self._turn, recovery))
                try:
                    return await attempt.run()
                except HopFailed as failure:
                    _forget_frames(failure, failure.error)
                    recovery.passed(attempt.passed)
                    recovery.failed(failure, await self._note(failure, underway, number, recovery))
                    if Hop.PREFILL in attempt.passed:
                        recovery.prefill_address = placement.prefill.address
        raise AssertionError("unreachable")

    async def _place(self, underway: Underway, recovery: Recovery, number: int) -> Placement:
        """Workers for the next attempt; where there are none now, those that come in time."""
        timeline = underway.timeline
        began = timeline.tokenized_at if number == 1 else timeline.now()
        while True:
            try:
                placement = self._fleet.place(underway.job, underway.num_tokens, recovery)
            except TandemError as nobody:
                await self._wait(underway, recovery, nobody)
                continue
            timeline.placed()
            record_route(placement, number, began, timeline.now())
            self._count(underway, number)
            return placement

    async def _wait(self, underway: Underway, recovery: Recovery, nobody: TandemError) -> None:
        """One pause, or the error that ends the request: with nothing delivered, a refusal is better told at once, and so is that
        hand-offs break everywhere."""
        delivered, last, patience = underway.completion.num_tokens > 0, recovery.last, self._patience
        pause_s = min(max(recovery.waited_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        most_s = patience.after_first_token_s if delivered else patience.before_first_token_s
        told = last is not None and (last.refused or bool(recovery.tried_pairs))
        if recovery.waited_s + pause_s > most_s or (told and not delivered):
            raise nobody if last is None else last.error
        await asyncio.sleep(pause_s)
        recovery.waited_s += pause_s
        recovery.new_round()

    async def _turn(self, recovery: Recovery, hop: Hop, worker: Worker) -> Turn:
        return await self._isolation.turn(worker.address) if recovery.suspects(hop) else Turn()

    async def _note(self, failure: HopFailed, underway: Underway, number: int, recovery: Recovery) -> Loss:
        """What became of the worker. With another one suspected to have died under the request, that must be known first."""
        logger.info(
            "request %s: attempt %d failed at %s on %s: %s",
            underway.job.request_id,
            number,
            failure.hop.value,
            failure.workers[0].address,
            failure.error.message,
        )
        loss = self._fleet.failed(failure)
        if failure.suspected is not None and (suspects := recovery.suspects(failure.suspected[0])):
            await self._fleet.settled(*suspects, loss)
        return loss

    def _count(self, underway: Underway, number: int) -> None:
        if number > 1:
            self.counts.num_migrations += underway.completion.num_tokens > 0
            self.counts.num_retries += underway.completion.num_tokens == 0


def _forget_frames(*errors: Exception) -> None:
    """What is remembered of a failure would otherwise hold the frames that hold it, and all of the request with them. So would what
    was being handled when it was raised."""
    for error in errors:
        known: BaseException | None = error
        while known is not None:
            known.__traceback__ = None
            known = known.__context__


def user_error(error: TandemError, num_tokens: int) -> TandemError:
    """What a failure means to the user, who has `num_tokens` tokens: with tokens out, no client may simply ask again."""
    lost = error.reason in LOSSES
    metadata = {**error.metadata, "cause": error.metadata.get("cause", error.reason.value)}
    if num_tokens:
        metadata["tokens_delivered"] = str(num_tokens)
    if error.reason is Reason.REQUEST_QUARANTINED:
        return TandemError(error.reason, error.message, metadata=metadata)
    if num_tokens and (lost or error.retry_after_s is not None):
        message = f"the completion broke off after {num_tokens} tokens: {error.message}"
        return TandemError(Reason.STREAM_BROKEN, message, metadata=metadata)
    if lost:
        return TandemError(Reason.WORKER_LOST, f"a worker was lost before the first token: {error.message}", metadata=metadata)
    return error

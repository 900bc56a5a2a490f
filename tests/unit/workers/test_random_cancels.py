"""Ten thousand cancels at random moments of a request's way through both workers' policy: not one block stays behind.

The batchers, allocators and the ticket ledger are the real ones; dice move steps, pulls and the clock. The order of calls in
each phase is that of the services and engines.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import pytest

from decode_svc.batcher import BatcherLimits as DecodeLimits
from decode_svc.batcher import DecodeBatcher, Run, SequenceState, Stage
from kvtransfer.ledger import TicketLedger
from llm.kv.allocator import BlockAllocator
from prefill_svc.batcher import BatcherLimits as PrefillLimits
from prefill_svc.batcher import Chunk, PrefillBatcher, PromptState
from tandem.errors import Reason, TandemError

CANCELS_PER_SEED = 2500
LEASE_S = 5.0


class Phase(Enum):
    """Where a request is when it is cancelled."""

    QUEUED = "queued"
    PREFILL = "prefill"
    HANDED = "admitted, nobody pulls"
    PULLING = "pulling"
    DECODE = "decode"
    LAST_TOKEN = "last token drawn, not yet read"


@dataclass(eq=False)
class Request:
    """One request; both of its legs, as far as they exist."""

    prompt: PromptState
    max_tokens: int
    ticket_id: str | None = None
    sequence: SequenceState | None = None
    reader: object = None

    @property
    def phase(self) -> Phase:
        sequence = self.sequence
        if self.ticket_id is None:
            return Phase.QUEUED
        if sequence is None:
            return Phase.HANDED if self.prompt.complete else Phase.PREFILL
        if sequence.stage is Stage.CLOSED:
            return Phase.LAST_TOKEN
        return Phase.PULLING if sequence.stage is Stage.PULLING else Phase.DECODE


@dataclass
class Workers:
    """Both workers, with pools so small that prompts wait and sequences are put back."""

    dice: random.Random
    now: float = 0.0
    num_granted: int = 0
    requests: list[Request] = field(default_factory=list)
    prefill_steps: list[list[Chunk]] = field(default_factory=list)
    decode_steps: list[list[Run]] = field(default_factory=list)
    written: list[tuple[BlockAllocator, list[int]]] = field(default_factory=list)
    """Blocks that the steps in flight write to."""
    cancels: Counter[Phase] = field(default_factory=Counter)
    num_served: int = 0

    def __post_init__(self) -> None:
        self.prefill_pool = BlockAllocator(24, 4)
        self.decode_pool = BlockAllocator(20, 4, prefix_cache=False)
        self.prefill = PrefillBatcher(self.prefill_pool, PrefillLimits(token_budget=12, max_prompts=8))
        self.decode = DecodeBatcher(self.decode_pool, DecodeLimits(max_batch=4, max_sequences=6, recompute_budget=6))
        self.ledger = TicketLedger(lambda: self.now, LEASE_S, self.prefill_pool.free)

    def arrive(self) -> None:
        tokens = [self.dice.randrange(3) for _ in range(self.dice.randint(1, 40))]
        try:
            request = Request(PromptState(tokens), self.dice.randint(1, 20))
            self.prefill.submit(request.prompt)
        except TandemError as refused:
            assert refused.reason in (Reason.QUEUE_FULL, Reason.POOL_TOO_SMALL)
        else:
            self.requests.append(request)
            self.admit()

    def admit(self) -> None:
        """Grants a ticket for each prompt that has been given its blocks."""
        admitted = {id(prompt) for prompt in self.prefill.admit()}
        for request in self.requests:
            if id(request.prompt) in admitted:
                self.prefill_pool.share(request.prompt.block_ids)
                self.num_granted += 1
                request.ticket_id = f"ticket {self.num_granted}"
                self.ledger.grant(request.ticket_id, 1, request.prompt.block_ids)

    def begin_prefill_step(self) -> None:
        if len(self.prefill_steps) < 2 and (chunks := self.prefill.schedule()):
            self.prefill_steps.append(chunks)
            self.written.append((self.prefill_pool, [block for chunk in chunks for block in chunk.prompt.block_ids]))

    def end_prefill_step(self) -> None:
        if not self.prefill_steps:
            return
        chunks = self.prefill_steps.pop(0)
        self.prefill.complete(chunks)
        self.forget_written(self.prefill_pool)
        done = {id(chunk.prompt) for chunk in chunks if chunk.prompt.complete}
        for request in self.requests:
            if id(request.prompt) in done:
                assert request.ticket_id is not None
                self.ledger.finish(request.ticket_id, 1)
                self.prefill.close(request.prompt)  # its call ends; the ticket keeps the blocks
        self.admit()

    def reserve(self) -> None:
        """A decode worker takes a ticket, or refuses it; the caller then gives the ticket up."""
        request = self.pick(Phase.PREFILL, Phase.HANDED)
        if request is None:
            return
        sequence = SequenceState(list(request.prompt.token_ids), request.prompt.num_tokens + request.max_tokens)
        try:
            self.decode.reserve(sequence)
        except TandemError:
            self.end(request)
            return
        request.sequence = sequence
        assert request.ticket_id is not None
        try:
            request.reader = self.ledger.open(request.ticket_id, 1)
        except TandemError as gone:
            assert gone.reason is Reason.TICKET_NOT_FOUND
            self.end(request)

    def pulled(self) -> None:
        request = self.pick(Phase.PULLING)
        if request is None or not request.prompt.complete:
            return
        sequence = request.sequence
        assert request.ticket_id is not None and sequence is not None
        self.close_reader(request)
        self.ledger.release(request.ticket_id, 1)
        self.decode.activate(sequence, sequence.num_tokens)
        self.draw(sequence)
        self.admit()

    def begin_decode_step(self) -> None:
        if not self.decode_steps and (runs := self.decode.schedule()):
            self.decode_steps.append(runs)
            self.written.append((self.decode_pool, [block for run in runs for block in run.sequence.block_ids]))

    def end_decode_step(self) -> None:
        if not self.decode_steps:
            return
        runs = self.decode_steps.pop(0)
        self.decode.complete(runs)
        self.forget_written(self.decode_pool)
        for run in runs:
            if run.draws and run.sequence.stage is Stage.ACTIVE:
                self.draw(run.sequence)

    def forget_written(self, pool: BlockAllocator) -> None:
        self.written.remove(next(entry for entry in self.written if entry[0] is pool))

    def draw(self, sequence: SequenceState) -> None:
        sequence.token_ids.append(1)
        if sequence.num_tokens >= sequence.max_total_tokens:
            self.decode.close(sequence)

    def read_end(self) -> None:
        request = self.pick(Phase.LAST_TOKEN)
        if request is not None:
            self.num_served += 1
            self.end(request)

    def pass_time(self) -> None:
        """Leases end that nobody renews; whoever reads such a ticket is told so, and ends its leg."""
        self.now += self.dice.uniform(0.0, LEASE_S / 2)
        over = {entry.ticket_id for entry in self.ledger.expire()}
        for request in [each for each in self.requests if each.ticket_id in over]:
            self.end(request)
        self.admit()

    def cancel(self) -> None:
        if self.requests:
            request = self.dice.choice(self.requests)
            self.cancels[request.phase] += 1
            self.end(request)

    def end(self, request: Request) -> None:
        """What the services' `finally` do, decode's leg first or prefill's."""
        self.requests.remove(request)
        for leg in self.dice.sample((self.end_decode, self.end_prefill), 2):
            leg(request)
        for pool, blocks in self.written:
            assert all(pool._references[block] for block in blocks), "a block is free that a step in flight writes to"
        self.admit()

    def end_prefill(self, request: Request) -> None:
        if request.ticket_id is not None:
            self.ledger.abort(request.ticket_id, TandemError(Reason.CANCELLED, "cancelled"))
        self.prefill.close(request.prompt)

    def end_decode(self, request: Request) -> None:
        self.close_reader(request)
        if request.sequence is not None:
            self.decode.close(request.sequence)

    def close_reader(self, request: Request) -> None:
        if request.reader is not None:
            self.ledger.close(request.reader)  # type: ignore[arg-type]
            request.reader = None

    def pick(self, *phases: Phase) -> Request | None:
        there = [request for request in self.requests if request.phase in phases]
        return self.dice.choice(there) if there else None

    def check(self) -> None:
        self.prefill_pool.check_integrity()
        self.decode_pool.check_integrity()

    def finish(self) -> None:
        """Whatever is still there is served, or ends with its lease."""
        moves = (self.begin_prefill_step, self.end_prefill_step, self.reserve, self.pulled)
        for move in (*moves, self.begin_decode_step, self.end_decode_step, self.read_end, self.pass_time):
            move()


def weighted(workers: Workers) -> tuple[Sequence[object], Sequence[float]]:
    moves = {
        workers.arrive: 3.0,
        workers.begin_prefill_step: 2.0,
        workers.end_prefill_step: 2.0,
        workers.reserve: 1.5,
        workers.pulled: 1.5,
        workers.begin_decode_step: 4.0,
        workers.end_decode_step: 4.0,
        workers.read_end: 0.7,
        workers.pass_time: 0.1,
        workers.cancel: 1.2,
    }
    return list(moves), list(moves.values())


@pytest.mark.parametrize("seed", range(4))
def test_no_cancel_leaves_a_block_behind(seed: int) -> None:
    workers = Workers(random.Random(seed))
    moves, weights = weighted(workers)
    while workers.cancels.total() < CANCELS_PER_SEED:
        for move in workers.dice.choices(moves, weights, k=50):
            move()  # type: ignore[operator]
        workers.check()
    assert min(workers.cancels[phase] for phase in Phase) >= 20, workers.cancels
    assert workers.num_served > 100
    for _ in range(2000):
        workers.finish()
        if not workers.requests and not workers.prefill_steps and not workers.decode_steps:
            break
    assert not workers.requests, "work goes on once nobody cancels"
    assert workers.ledger.num_outstanding == 0
    assert (workers.prefill_pool.num_free, workers.decode_pool.num_free) == (24, 20)
    workers.check()

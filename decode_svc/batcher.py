"""Which sequences take part in the next decode step. Pure policy: no tensors, no gRPC, no clock."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from llm.kv.allocator import BlockAllocator, OutOfBlocksError
from tandem.errors import Reason, TandemError

MIN_RETRY_S, MAX_RETRY_S = 0.05, 5.0


class Stage(Enum):
    """Where a sequence stands."""

    PULLING = "pulling"  # has its blocks; their KV is on the way
    ARRIVING = "arriving"  # the same, but the device orders a step behind the copies; nobody has verified them yet
    ACTIVE = "active"  # its KV is here but for the newest token, or is being computed again
    PREEMPTED = "preempted"  # gave its blocks up to older sequences; waits to get some again
    CLOSED = "closed"


_PULLED_INTO = (Stage.PULLING, Stage.ARRIVING)
"""A pull writes to the sequence's blocks, or may do so again: they stay its own."""


@dataclass(eq=False)
class SequenceState:
    """A sequence in the batcher: owned by the batcher, its tokens appended by the engine.

    A step may be scheduled while the one before it is in flight: the tokens that that one draws then count, though nobody knows
    them yet. `num_scheduled_tokens`: those whose KV is in the pool once all steps in flight are complete.
    `block_ids` is an array of C ints since every step turns it into one: from a list that takes as long as the rest of the step.
    """

    token_ids: list[int]
    max_total_tokens: int
    block_ids: "array[int]" = field(default_factory=lambda: array("i"))
    num_scheduled_tokens: int = 0
    num_drawing: int = 0
    """Tokens that steps in flight draw."""
    num_flights: int = 0
    """Steps in flight that use the blocks."""
    host_draws: bool = False
    """What is being drawn of it comes from the host, when the step has landed; until then nothing can follow."""
    num_preemptions: int = 0
    stage: Stage = Stage.PULLING
    deadline: float = math.inf
    """On the engine's clock."""

    @property
    def num_tokens(self) -> int:
        """Those that are being drawn included."""
        return len(self.token_ids) + self.num_drawing


@dataclass(slots=True)
class Run:
    """`num_tokens` tokens of a sequence, from token `start`, to be computed in one step. Left as made; not frozen, for speed.

    The sequence's blocks stay as they are until the step is complete. `draws` says that the run reaches the newest token, so that
    the next can be drawn. That newest token may be one that the step before is drawing.
    """

    sequence: SequenceState
    start: int
    num_tokens: int
    draws: bool

    @property
    def follows(self) -> bool:
        """Its token, there is but one then, is being drawn by the step before."""
        return self.start >= len(self.sequence.token_ids)


@dataclass(frozen=True)
class BatcherLimits:
    """`max_batch`: most sequences of one step. `max_sequences`: most in the worker at all stages.

    `recompute_budget`: most tokens per step spent on computing preempted sequences' KV again.
    """

    max_batch: int = 64
    max_sequences: int = 256
    recompute_budget: int = 256


class DecodeBatcher:
    """Continuous batching: sequences join and leave between steps, oldest first.

    When blocks run out, the youngest active sequence gives all of its blocks up and is computed again later. New reservations leave
    untouched what preempted sequences need to return, so that these come first. A sequence closed in the middle of a step keeps its
    blocks until `complete`. Nobody gives way while a step is in flight, since blocks that it writes to cannot be had, nor while its
    own are pulled into.

    No step touches a sequence's blocks one by one: with long sequences that would take longer than the model. Not thread-safe: the
    engine's lock guards it.
    """

    def __init__(self, allocator: BlockAllocator, limits: BatcherLimits) -> None:
        self._allocator = allocator
        self._limits = limits
        self._sequences: dict[SequenceState, None] = {}  # in order of arrival
        self._num_flights = 0
        self._starved = False  # somebody goes without a block until no step is in flight

    def reserve(self, sequence: SequenceState, tokens_per_second: float = 0.0) -> None:
        """Gives a new sequence blocks for its tokens and one more.

        Raises QUEUE_FULL or KV_BLOCKS_EXHAUSTED if there is no room, POOL_TOO_SMALL if there never is. When to come back is told by
        the speed with which all tokens together are drawn; 0 if that is not known yet.
        """
        if len(self._sequences) >= self._limits.max_sequences:
            retry_after_s = self._until_one_ends_s(tokens_per_second)
            raise TandemError(Reason.QUEUE_FULL, f"{len(self._sequences)} sequences are already here", retry_after_s=retry_after_s)
        if self._blocks_for(sequence.max_total_tokens) > self._allocator.num_blocks:
            message = f"{sequence.max_total_tokens} tokens never fit this worker's {self._allocator.num_blocks} KV blocks"
            raise TandemError(Reason.POOL_TOO_SMALL, message)
        needed = self._blocks_for(sequence.num_tokens + 1)
        room = self._allocator.num_free - self._blocks_owed()
        if needed > room:
            message = f"{needed} KV blocks are needed, {max(room, 0)} are free"
            raise TandemError(Reason.KV_BLOCKS_EXHAUSTED, message, retry_after_s=self._until_one_ends_s(tokens_per_second))
        sequence.block_ids = array("i", self._allocator.allocate(needed))
        self._sequences[sequence] = None

    def _until_one_ends_s(self, tokens_per_second: float) -> float | None:
        """Until the sequence that is nearest to its end gets there, at the latest; None if that cannot be told."""
        left = min((s.max_total_tokens - s.num_tokens for s in self._in_stage(Stage.ACTIVE)), default=0)
        if tokens_per_second <= 0 or not left:
            return None
        return min(max(left * self.num_active / tokens_per_second, MIN_RETRY_S), MAX_RETRY_S)

    def activate(self, sequence: SequenceState, num_pulled_tokens: int) -> None:
        """The sequence's KV has arrived for its first `num_pulled_tokens` tokens."""
        self.expect(sequence, num_pulled_tokens)
        self.verified(sequence)

    def expect(self, sequence: SequenceState, num_pulled_tokens: int) -> None:
        """The same KV will be here before the device begins the next step, but is not verified. Until it is, the sequence takes
        part in one step."""
        assert sequence.stage is Stage.PULLING, sequence.stage
        sequence.num_scheduled_tokens = num_pulled_tokens
        sequence.stage = Stage.ARRIVING

    def verified(self, sequence: SequenceState) -> None:
        """What was expected is here, and good."""
        assert sequence.stage is Stage.ARRIVING, sequence.stage
        sequence.stage = Stage.ACTIVE

    def withdraw(self, sequence: SequenceState) -> SequenceState:
        """What was expected was not good, or did not come: another sequence pulls into the same blocks, and this one is closed.

        It keeps a reference to the blocks while a step uses them, as every closed sequence does. That step reads what a new pull
        may be writing, so what it draws is of no use. What it writes is the KV of its newest token, behind all that is pulled: the
        first step of the other sequence comes after it on the device, and writes the same place before anything reads it.
        """
        assert sequence.stage is Stage.ARRIVING, sequence.stage
        other = SequenceState(
            sequence.token_ids[:-1], sequence.max_total_tokens, array("i", sequence.block_ids), deadline=sequence.deadline
        )
        self._allocator.share(other.block_ids)
        self._sequences[other] = None
        self.close(sequence)
        return other

    def expired(self, now: float) -> list[SequenceState]:
        """Sequences whose deadline has passed, to be closed; not those whose blocks are still being written to by a pull."""
        return [sequence for sequence in self._sequences if sequence.deadline <= now and sequence.stage not in _PULLED_INTO]

    def schedule(self) -> list[Run]:
        """The next step's runs; `complete` must follow for each step, in order.

        With a step in flight there may be none, and yet something to do once that is complete.
        """
        if self._starved and self._num_flights:
            return []
        self._starved = False
        self._readmit()
        runs, budget, block_tokens = [], self._limits.recompute_budget, self._allocator.block_tokens
        for sequence in self._unfinished()[: self._limits.max_batch]:
            if sequence.stage is Stage.PREEMPTED:
                continue  # gave way to an older one of this very step
            if len(sequence.block_ids) * block_tokens >= sequence.num_tokens or self._make_room(sequence):
                runs.append(self._launch(sequence, budget))
                budget -= runs[-1].num_tokens - 1
        self._num_flights += bool(runs)
        return runs

    def complete(self, runs: Sequence[Run]) -> None:
        """Takes note that a step is complete; the tokens it drew are appended by the caller, after this."""
        self._num_flights -= bool(runs)
        for run in runs:
            sequence = run.sequence
            sequence.num_flights -= 1
            sequence.num_drawing -= run.draws
            if sequence.stage is Stage.CLOSED and not sequence.num_flights:
                self._release(sequence)

    def close(self, sequence: SequenceState) -> None:
        """Ends a sequence at whatever stage it is and gives back its blocks. Idempotent."""
        if sequence not in self._sequences:
            return
        del self._sequences[sequence]
        sequence.stage = Stage.CLOSED
        if not sequence.num_flights:
            self._release(sequence)

    def _unfinished(self) -> list[SequenceState]:
        """Active sequences but those whose last token is being drawn, and those that wait for the host to draw; arriving ones that
        have not had their step."""
        return [
            s
            for s in self._sequences
            if (s.stage is Stage.ACTIVE and (not s.num_drawing or self._may_follow(s)))
            or (s.stage is Stage.ARRIVING and s.num_scheduled_tokens < len(s.token_ids))
        ]

    def _may_follow(self, sequence: SequenceState) -> bool:
        return not sequence.host_draws and sequence.num_tokens < sequence.max_total_tokens

    def _launch(self, sequence: SequenceState, budget: int) -> Run:
        missing = sequence.num_tokens - sequence.num_scheduled_tokens
        num_tokens = min(missing, budget + 1)
        run = Run(sequence, sequence.num_scheduled_tokens, num_tokens, num_tokens == missing)
        sequence.num_scheduled_tokens += num_tokens
        sequence.num_drawing += run.draws
        sequence.num_flights += 1
        return run

    def _release(self, sequence: SequenceState) -> None:
        self._allocator.free(sequence.block_ids)
        sequence.block_ids = array("i")

    def _make_room(self, sequence: SequenceState) -> bool:
        """Ensures a block for the newest token, at the cost of younger sequences; False if the sequence must wait."""
        while len(sequence.block_ids) < self._blocks_for(sequence.num_tokens):
            try:
                sequence.block_ids.extend(self._allocator.allocate(1))
            except OutOfBlocksError:
                if self._num_flights:
                    self._starved = True
                    return False
                victim = self._in_stage(Stage.ACTIVE)[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self._release(sequence)
        sequence.num_scheduled_tokens = 0
        sequence.num_preemptions += 1
        sequence.stage = Stage.PREEMPTED

    def _readmit(self) -> None:
        """Gives preempted sequences blocks again, oldest first, while there are enough for all their tokens and one more."""
        for sequence in self._in_stage(Stage.PREEMPTED):
            try:
                sequence.block_ids = array("i", self._allocator.allocate(self._blocks_for(sequence.num_tokens + 1)))
            except OutOfBlocksError:
                return
            sequence.stage = Stage.ACTIVE

    def _in_stage(self, stage: Stage) -> list[SequenceState]:
        return [sequence for sequence in self._sequences if sequence.stage is stage]

    def _blocks_owed(self) -> int:
        return sum(self._blocks_for(s.num_tokens + 1) for s in self._sequences if s.stage is Stage.PREEMPTED)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._allocator.block_tokens)

    @property
    def num_pulling(self) -> int:
        return sum(sequence.stage in _PULLED_INTO for sequence in self._sequences)

    @property
    def num_waiting(self) -> int:
        return self.num_pulling + len(self._in_stage(Stage.PREEMPTED))

    @property
    def num_active(self) -> int:
        return len(self._in_stage(Stage.ACTIVE))

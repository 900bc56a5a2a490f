"""The decode engine: one thread that draws the next token of every active sequence, step by step."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decode_svc.batcher import DecodeBatcher, Run, SequenceState, Stage
from decode_svc.job import DecodeEvent, DecodeJob, Drawn, Ended, EndReason, Failed
from llm.kv.allocator import BlockAllocator
from llm.kv.copying import Event
from llm.runner import ModelRunner, SequenceSlice
from llm.sampling import SampledToken, SampleRow
from llm.steps import StepResult, steps_of
from tandem.engine_thread import Courier, EngineThread, Outlet, Speed
from tandem.errors import Reason, TandemError
from tandem.pacer import Pacer

_LATE = Failed(TandemError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the completion ended"))


Work = Sequence[tuple[Run, DecodeJob]]


@dataclass(frozen=True)
class _Flight:
    """A launched step. `row_of`: which of its rows draws a sequence's next token."""

    work: Work
    result: StepResult
    row_of: dict[SequenceState, int]
    started: float


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is at one moment."""

    num_waiting: int
    num_active: int
    num_pulling: int
    num_free_blocks: int
    tokens_per_second: float


class DecodeEngine:
    """Owns the allocator and the batcher (behind one lock) and the thread that runs the model.

    Where the device draws tokens by itself a step is launched before the tokens of the one before it are known. An end that is
    found so late costs a superfluous step of that sequence, whose token is thrown away. A sequence whose tokens only the host can
    draw takes part in every second step.
    There a sequence may also take part in a step whose beginning the device puts off until the sequence's KV is copied, before that
    is verified (`expect`). What the step draws is kept until it is (`activate`), or thrown away (`withdraw`).
    `on_change` is called, on whatever thread, when a request has come, begun or gone; not at each step: that is a message for
    every few tokens of a single sequence. `on_failure` is called once, on the engine's own thread.
    `reserve`, `expect`, `withdraw`, `activate` and `close` may be called from any thread and return at once; events arrive at the
    job's outlet.
    """

    def __init__(
        self,
        runner: ModelRunner,
        allocator: BlockAllocator,
        batcher: DecodeBatcher,
        courier: Courier,
        *,
        on_failure: Callable[[Exception], None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._steps = steps_of(runner)
        self._flights: deque[_Flight] = deque()
        self._pacer = Pacer()
        self._allocator = allocator
        self._batcher = batcher
        self._courier = courier
        self._on_failure = on_failure
        self._on_change = on_change
        self._failure: Failed | None = None
        self._lock = threading.Lock()
        self._jobs: dict[SequenceState, DecodeJob] = {}
        self._speed = Speed()
        self._thread = EngineThread("decode-engine", runner.adopt_thread, self.step, self._fail)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        return self._thread.stop(timeout_s)

    def reserve(self, job: DecodeJob) -> Sequence[int]:
        """Takes a job in and returns its blocks; the caller must `close` it.

        Raises QUEUE_FULL, KV_BLOCKS_EXHAUSTED, POOL_TOO_SMALL, ENGINE_FAILED.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure.error
            self._batcher.reserve(job.sequence, self._speed.tokens_per_second)
            self._jobs[job.sequence] = job
            block_ids = tuple(job.sequence.block_ids)
        self._on_change()
        return block_ids

    def expect(self, job: DecodeJob, first_token_id: int, after: Sequence[Event]) -> None:
        """The KV of the job's tokens will have arrived when the device has passed `after`, but is not verified. May be repeated.

        What only the host can draw is not drawn from KV that may be damaged: there, what is no number is an error of the engine.
        """
        with self._lock:
            sequence, num_completion_tokens = job.sequence, job.num_completion_tokens + 1
            if not self._steps.ahead or sequence.stage is not Stage.PULLING:
                return
            if job.stop_rule.ends_at(first_token_id, num_completion_tokens) is not None:
                return
            if not job.sample_row(sequence.num_tokens + 1).fits_device:
                return
            self._batcher.expect(sequence, sequence.num_tokens)
            job.append(first_token_id)
            job.after = after
        self._thread.wake()

    def withdraw(self, job: DecodeJob) -> None:
        """The job's blocks will be written again: what was drawn from them, or is being drawn, is thrown away. Idempotent."""
        with self._lock:
            if job.sequence.stage is Stage.ARRIVING:
                del self._jobs[job.sequence]
                job.start_over(self._batcher.withdraw(job.sequence))
                self._jobs[job.sequence] = job

    def activate(self, job: DecodeJob, first_token_id: int) -> None:
        """The KV of the job's tokens has arrived and is verified, and the first token of its completion is known."""
        job.ready_ns = time.monotonic_ns()
        with self._lock:
            if job.sequence.stage is Stage.ARRIVING:
                self._batcher.verified(job.sequence)
                self._courier.send(() if job.held is None else self._append(job, job.held))
            else:
                self._batcher.activate(job.sequence, job.sequence.num_tokens)
                reason = job.append(first_token_id)
                self._courier.send(() if reason is None else self._end(job, reason))
        self._wake()

    def close(self, job: DecodeJob) -> None:
        """Ends a job at whatever stage it is and gives back its blocks. Idempotent."""
        with self._lock:
            if self._jobs.pop(job.sequence, None) is not None:
                self._batcher.close(job.sequence)
        self._wake()

    def load(self) -> EngineLoad:
        with self._lock:
            batcher, speed = self._batcher, self._speed.tokens_per_second
            return EngineLoad(batcher.num_waiting, batcher.num_active, batcher.num_pulling, self._allocator.num_free, speed)

    @property
    def thread(self) -> EngineThread:
        return self._thread

    def step(self) -> bool:
        """Launches a step and takes in those before it; False if there was nothing to do."""
        self._pacer.pause()
        began = self._pacer.now()
        work, after = self._schedule()
        if not work and not self._flights:
            return False
        if work:
            self._launch(work, after, began)
        self._land(keep=int(bool(work) and self._steps.ahead))
        return True

    def _wake(self) -> None:
        self._thread.wake()
        self._on_change()

    def _expire(self) -> None:
        """Lock held."""
        late = [self._jobs.pop(sequence) for sequence in self._batcher.expired(self.clock())]
        for job in late:
            self._batcher.close(job.sequence)
        self._courier.send([(job.outlet, _LATE) for job in late])

    def _schedule(self) -> tuple[Work, list[Event]]:
        """The next step's work, and what the device must have passed before it."""
        with self._lock:
            self._expire()
            work = [(run, self._jobs[run.sequence]) for run in self._batcher.schedule()]
            after = [event for run, job in work if run.sequence.stage is Stage.ARRIVING for event in job.after]
            now = time.monotonic_ns()
            for _, job in work:
                job.started_ns = job.started_ns or now
        return work, after

    def _launch(self, work: Work, after: Sequence[Event], began: float) -> None:
        """Begins a step that draws a token for each run that reaches the newest one, in order."""
        started, rows = self._speed.start(), _rows_of(work)
        row_of = self._flights[-1].row_of if self._flights else {}
        slices, sources = [], []
        for run, _ in work:
            slices.append(_slice_of(run))
            sources.append(row_of.get(run.sequence, -1) if run.follows else -1)  # none follows a cancelled sequence
        result = self._steps.launch(slices, sources, rows, after)
        drawing = (run.sequence for run, _ in work if run.draws)
        self._flights.append(_Flight(work, result, {sequence: row for row, sequence in enumerate(drawing)}, started))
        self._pacer.launched(began, 1)

    def _land(self, keep: int) -> None:
        """Takes in the steps in flight but for the last `keep`."""
        while len(self._flights) > keep:
            flight = self._flights.popleft()
            tokens = flight.result.wait()
            self._pacer.landed()
            self._publish(flight.work, tokens)
            self._speed.add(len(tokens), flight.started)

    def _publish(self, work: Work, tokens: Sequence[SampledToken]) -> None:
        """Appends the tokens and sends them off; the oldest work of a step comes first."""
        drawing = [(run.sequence, job) for run, job in work if run.draws]
        deliveries: list[tuple[Outlet[DecodeEvent], DecodeEvent]] = []
        with self._lock:
            self._batcher.complete([run for run, _ in work])
            for (sequence, job), token in zip(drawing, tokens, strict=True):
                if sequence.stage is Stage.ACTIVE:
                    deliveries += self._append(job, token)
                elif sequence.stage is Stage.ARRIVING:
                    job.held = token
            self._courier.send(deliveries)

    def _append(self, job: DecodeJob, token: SampledToken) -> list[tuple[Outlet[DecodeEvent], DecodeEvent]]:
        """Lock held. Gives a token to the completion; what is to be told of it."""
        drawn = Drawn(job.num_completion_tokens, token)
        reason = job.append(token.token_id)
        return [(job.outlet, drawn), *(() if reason is None else self._end(job, reason))]

    def _end(self, job: DecodeJob, reason: EndReason) -> list[tuple[Outlet[DecodeEvent], DecodeEvent]]:
        """Lock held. Frees the blocks at once, without waiting for the stream to be read."""
        job.ended_ns = time.monotonic_ns()
        del self._jobs[job.sequence]
        self._batcher.close(job.sequence)
        return [(job.outlet, Ended(reason))]

    def _fail(self, error: Exception) -> None:
        failure = Failed(TandemError(Reason.ENGINE_FAILED, "the decode engine failed; the worker restarts"))
        with self._lock:
            self._failure = failure
            self._courier.send([(job.outlet, failure) for job in self._jobs.values()])
        self._on_failure(error)


def _rows_of(work: Work) -> list[SampleRow]:
    """How each is drawn; which the sequences learn, too."""
    rows = []
    for run, job in work:
        if run.draws:
            rows.append(job.sample_row(run.start + run.num_tokens))
            run.sequence.host_draws = not rows[-1].fits_device
    return rows


def _slice_of(run: Run) -> SequenceSlice:
    sequence = run.sequence
    tokens = sequence.token_ids[run.start : run.start + run.num_tokens] or [0]  # one that follows is not known
    return SequenceSlice(tokens, run.start, sequence.block_ids, "last" if run.draws else "none")

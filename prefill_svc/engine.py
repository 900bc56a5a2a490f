"""The prefill engine: one thread that turns prompts into KV blocks and first tokens."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm.kv.allocator import BlockAllocator
from llm.runner import ModelRunner, SequenceSlice
from llm.sampling import SampledToken, SampleRow, sample, token_logprobs
from llm.steps import Complete, StepResult, steps_of
from prefill_svc.batcher import Chunk, PrefillBatcher, PromptState
from prefill_svc.job import Admitted, Failed, Finished, PrefillEvent, PrefillJob, Progress
from tandem.engine_thread import Courier, EngineThread, Mailbox, Speed
from tandem.errors import Reason, TandemError
from tandem.pacer import Pacer

_LATE = Failed(TandemError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the prompt was computed"))


Work = Sequence[tuple[Chunk, PrefillJob]]


@dataclass(frozen=True)
class _Flight:
    """A launched step."""

    work: Work
    result: StepResult
    num_tokens: int
    started: float


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is at one moment."""

    num_waiting: int
    num_running: int
    num_admitted: int
    num_queued_tokens: int
    num_free_blocks: int
    tokens_per_second: float


class PrefillEngine:
    """Owns the allocator and the batcher (behind one lock) and the thread that runs the model.

    Where the device draws tokens by itself a step is launched before the one before it is complete. What is said of a step's KV is
    said once it is in the pool: its transfer begins while the first tokens are still being drawn.

    `on_change` is called, on whatever thread, whenever the load has changed; `on_failure` once, on the engine's own.
    `submit`, `close`, `share` and `free` may be called from any thread and return at once; events arrive in the job's mailbox.
    """

    def __init__(
        self,
        runner: ModelRunner,
        allocator: BlockAllocator,
        batcher: PrefillBatcher,
        courier: Courier,
        *,
        on_failure: Callable[[Exception], None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._runner = runner
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
        self._jobs: dict[PromptState, PrefillJob] = {}
        self._speed = Speed()
        self._thread = EngineThread("prefill-engine", runner.adopt_thread, self.step, self._fail)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        return self._thread.stop(timeout_s)

    def submit(self, job: PrefillJob) -> None:
        """Queues a job; the caller must `close` it, however it ends. Raises POOL_TOO_SMALL, QUEUE_FULL, ENGINE_FAILED."""
        with self._lock:
            if self._failure is not None:
                raise self._failure.error
            self._batcher.submit(job.prompt, self._speed.tokens_per_second)
            self._jobs[job.prompt] = job
            self._admit()
        self._wake()

    def close(self, job: PrefillJob) -> None:
        """Ends a job at whatever stage it is and gives back its blocks. Idempotent."""
        with self._lock:
            if self._jobs.pop(job.prompt, None) is not None:
                self._batcher.close(job.prompt)
                self._admit()
        self._wake()

    def share(self, job: PrefillJob) -> bool:
        """Takes a further reference to a job's blocks, which `free` gives back; False if the job has ended: they are another's."""
        with self._lock:
            if job.prompt not in self._jobs:
                return False
            self._allocator.share(job.prompt.block_ids)
            return True

    def free(self, block_ids: Sequence[int]) -> None:
        """Gives back a reference taken by `share`."""
        with self._lock:
            self._allocator.free(block_ids)
            self._admit()
        self._wake()

    def load(self) -> EngineLoad:
        with self._lock:
            batcher = self._batcher
            return EngineLoad(
                num_waiting=batcher.num_waiting,
                num_running=batcher.num_running,
                num_admitted=batcher.num_admitted,
                num_queued_tokens=batcher.num_queued_tokens,
                num_free_blocks=self._allocator.num_free,
                tokens_per_second=self._speed.tokens_per_second,
            )

    @property
    def thread(self) -> EngineThread:
        return self._thread

    def step(self) -> bool:
        """Launches a step and takes in those before it; False if there was nothing to do."""
        if not self._settled():
            self._pacer.pause()
        began = self._pacer.now()
        work = self._schedule()
        if not work and not self._flights:
            return False
        rows = [job.sample_row() for chunk, job in work if chunk.last]
        ahead = bool(work) and not _wants_prompt_logprobs(work) and self._steps.ahead
        if not ahead:
            self._land(keep=0)
        if work:
            self._launch(work, rows, began)
        self._land(keep=int(ahead))
        self._on_change()
        return True

    def _settled(self) -> bool:
        """Whether there is nobody to wait for before the next step is launched."""
        with self._lock:
            return self._batcher.settled

    def _wake(self) -> None:
        self._thread.wake()
        self._on_change()

    def _admit(self) -> None:
        """Lock held. Nothing begins after its deadline. Events of admission leave before any event of the step that follows it."""
        self._expire()
        admitted = self._batcher.admit()
        self._courier.send([(self._jobs[p].mailbox, Admitted(p.block_ids, p.num_cached_tokens)) for p in admitted])

    def _expire(self) -> None:
        """Lock held."""
        late = [self._jobs.pop(prompt) for prompt in self._batcher.expired(self.clock())]
        for job in late:
            self._batcher.close(job.prompt)
        self._courier.send([(job.mailbox, _LATE) for job in late])

    def _schedule(self) -> Work:
        with self._lock:
            self._admit()
            work = [(chunk, self._jobs[chunk.prompt]) for chunk in self._batcher.schedule()]
        now = time.monotonic_ns()
        for _, job in work:
            job.started_ns = job.started_ns or now
        return work

    def _launch(self, work: Work, rows: Sequence[SampleRow], began: float) -> None:
        """Begins a step that draws the first token of each prompt whose last chunk is in it, in order."""
        started, num_tokens = self._speed.start(), sum(chunk.num_tokens for chunk, _ in work)
        slices = [_slice_of(chunk, job) for chunk, job in work]
        if _wants_prompt_logprobs(work):
            result: StepResult = Complete(self._run(work, slices, rows))
        else:
            result = self._steps.launch(slices, [-1] * len(slices), rows)
        self._flights.append(_Flight(work, result, num_tokens, started))
        self._pacer.launched(began, num_tokens)

    def _land(self, keep: int) -> None:
        """Takes in the steps in flight but for the last `keep`."""
        while len(self._flights) > keep:
            flight = self._flights.popleft()
            flight.result.wait_filled()
            self._announce(flight.work)
            tokens = flight.result.wait()
            self._pacer.landed()
            self._publish(flight.work, tokens)
            self._speed.add(flight.num_tokens, flight.started)

    def _run(self, work: Work, slices: Sequence[SequenceSlice], sample_rows: Sequence[SampleRow]) -> list[SampledToken]:
        """As a launched step, and notes the prompts' log-probabilities."""
        logits = self._runner.forward(slices)
        rows, next_row = [], 0
        for chunk, job in work:
            num_rows = chunk.num_tokens if job.num_prompt_logprobs is not None else int(chunk.last)
            if job.num_prompt_logprobs is not None:
                job.prompt_logprobs += _prompt_logprobs(logits[next_row : next_row + num_rows], chunk, job.num_prompt_logprobs)
            next_row += num_rows
            if chunk.last:
                rows.append(next_row - 1)
        return sample(logits[rows], sample_rows) if rows else []

    def _announce(self, work: Work) -> None:
        """K and V of these chunks are in the pool."""
        self._courier.send([(job.mailbox, Progress(chunk.start + chunk.num_tokens)) for chunk, job in work])

    def _publish(self, work: Work, tokens: Sequence[SampledToken]) -> None:
        now, drawn = time.monotonic_ns(), iter(tokens)
        events: list[tuple[Mailbox[PrefillEvent], PrefillEvent]] = [
            (job.mailbox, Finished(next(drawn), job.prompt_logprobs, job.started_ns, now)) for chunk, job in work if chunk.last
        ]
        with self._lock:
            self._batcher.complete([chunk for chunk, _ in work])
            self._courier.send(events)
            self._admit()

    def _fail(self, error: Exception) -> None:
        failure = Failed(TandemError(Reason.ENGINE_FAILED, "the prefill engine failed; the worker restarts"))
        with self._lock:
            self._failure = failure
            self._courier.send([(job.mailbox, failure) for job in self._jobs.values()])
        self._on_failure(error)


def _slice_of(chunk: Chunk, job: PrefillJob) -> SequenceSlice:
    prompt = chunk.prompt
    wanted: Literal["none", "last", "all"] = "all" if job.num_prompt_logprobs is not None else "last" if chunk.last else "none"
    return SequenceSlice(prompt.token_ids[chunk.start : chunk.start + chunk.num_tokens], chunk.start, prompt.block_ids, wanted)


def _wants_prompt_logprobs(work: Work) -> bool:
    return any(job.num_prompt_logprobs is not None for _, job in work)


def _prompt_logprobs(logits: Tensor, chunk: Chunk, count: int) -> list[SampledToken]:
    """Logits [chunk tokens, vocab] at positions start.. predict the prompt's tokens start + 1..; the last has none to predict."""
    following = chunk.prompt.token_ids[chunk.start + 1 : chunk.start + 1 + chunk.num_tokens]
    return token_logprobs(logits[: len(following)], following, count) if following else []

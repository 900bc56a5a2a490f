"""Which tokens of which prompts the next step computes. Pure policy: no tensors, no gRPC, no clock."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llm.kv.allocator import BlockAllocator, OutOfBlocksError
from tandem.errors import Reason, TandemError


@dataclass(eq=False)
class PromptState:
    """A prompt on its way through the batcher; owned by the batcher, read by the engine."""

    token_ids: Sequence[int]
    use_prefix_cache: bool = True
    block_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_flights: int = 0
    """Steps in flight that compute some of it."""
    closed: bool = False
    deadline: float = math.inf
    """On the engine's clock."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        return self.num_computed_tokens == self.num_tokens


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of a prompt, from token `start`, to be computed in one step."""

    prompt: PromptState
    start: int
    num_tokens: int

    @property
    def last(self) -> bool:
        return self.start + self.num_tokens == self.prompt.num_tokens


@dataclass(frozen=True)
class BatcherLimits:
    """`token_budget`: most tokens of one step. `max_prompts`: most prompts waiting and running."""

    token_budget: int = 512
    max_prompts: int = 256


class PrefillBatcher:
    """First come, first served: prompts get their blocks in order of arrival, and each step takes tokens in that order.

    A prompt keeps its blocks from admission until `close`; if it is closed in the middle of a step that computes some of it, until
    `complete`, so that they are not reused under the running computation. A step may be scheduled while others are in flight. Not
    thread-safe: the engine's lock guards it.
    """

    def __init__(self, allocator: BlockAllocator, limits: BatcherLimits) -> None:
        self._allocator = allocator
        self._limits = limits
        self._waiting: deque[PromptState] = deque()
        self._running: list[PromptState] = []
        self.num_admitted = 0
        """Prompts that have been given their blocks so far."""

    def submit(self, prompt: PromptState) -> None:
        """Queues a prompt; POOL_TOO_SMALL if no pool of this size ever holds it, QUEUE_FULL if too many wait."""
        needed = -(-prompt.num_tokens // self._allocator.block_tokens)
        if needed > self._allocator.num_blocks:
            message = f"the prompt needs {needed} KV blocks, this worker has {self._allocator.num_blocks} in all"
            raise TandemError(Reason.POOL_TOO_SMALL, message, metadata={"needed_blocks": str(needed)})
        if self.num_prompts >= self._limits.max_prompts:
            raise TandemError(Reason.QUEUE_FULL, f"{self.num_prompts} prompts are already here", retry_after_s=1.0)
        self._waiting.append(prompt)

    def admit(self) -> list[PromptState]:
        """Gives blocks to waiting prompts, oldest first, until the pool has no room for the next."""
        admitted = []
        while self._waiting:
            prompt = self._waiting[0]
            try:
                blocks = self._allocator.allocate_prompt(prompt.token_ids, use_cache=prompt.use_prefix_cache)
            except OutOfBlocksError:
                break
            prompt.block_ids = list(blocks.block_ids)
            prompt.num_cached_tokens = prompt.num_computed_tokens = prompt.num_scheduled_tokens = blocks.num_cached_tokens
            self._running.append(self._waiting.popleft())
            admitted.append(prompt)
        self.num_admitted += len(admitted)
        return admitted

    def expired(self, now: float) -> list[PromptState]:
        """Prompts whose deadline has passed, to be closed."""
        return [prompt for prompt in (*self._waiting, *self._running) if prompt.deadline <= now]

    def schedule(self) -> list[Chunk]:
        """The next step: packed chunks of the oldest prompts, `token_budget` tokens at most. `complete` must follow, in order."""
        chunks = list(self._pack())
        for chunk in chunks:
            chunk.prompt.num_scheduled_tokens += chunk.num_tokens
            chunk.prompt.num_flights += 1
        return chunks

    def _pack(self) -> Iterator[Chunk]:
        budget = self._limits.token_budget
        for prompt in self._running:
            num_tokens = min(budget, prompt.num_tokens - prompt.num_scheduled_tokens)
            if num_tokens > 0:
                yield Chunk(prompt, prompt.num_scheduled_tokens, num_tokens)
            budget -= num_tokens
            if budget == 0:
                return

    def complete(self, chunks: Sequence[Chunk]) -> None:
        """Takes note that the chunks' KV is in the pool: full blocks become findable, finished prompts leave the batch."""
        for chunk in chunks:
            prompt = chunk.prompt
            prompt.num_computed_tokens = chunk.start + chunk.num_tokens
            prompt.num_flights -= 1
            if prompt.closed:
                if not prompt.num_flights:
                    self._allocator.free(prompt.block_ids)
                continue
            self._allocator.commit(prompt.token_ids, prompt.block_ids, prompt.num_computed_tokens)
            if prompt.complete:
                self._running.remove(prompt)

    def close(self, prompt: PromptState) -> None:
        """Ends a prompt at whatever stage it is and gives back its own reference to its blocks. Idempotent."""
        if prompt.closed:
            return
        prompt.closed = True
        if prompt in self._waiting:
            self._waiting.remove(prompt)
            return
        if not prompt.complete:
            self._running.remove(prompt)
        if not prompt.num_flights:
            self._allocator.free(prompt.block_ids)

    @property
    def num_prompts(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens still to compute for waiting and running prompts."""
        prompts = [*self._waiting, *self._running]
        return sum(prompt.num_tokens - prompt.num_computed_tokens for prompt in prompts)

"""Which tokens of which prompts the next step computes. Pure policy: no tensors, no gRPC, no clock."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llm.kv.allocator import BlockAllocator, OutOfBlocksError
from prefill_svc import fairness
from tandem.errors import Reason, TandemError

MIN_RETRY_S = 0.05


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
    num_passed_tokens: int = 0
    """Tokens of shorter prompts that were given blocks before it."""
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
    """`token_budget`: most tokens of one step; half is what prompts are packed to. `max_prompts`: most prompts waiting and running.

    `max_queued_tokens`: most tokens still to compute, beyond which only short prompts are taken.
    """

    token_budget: int = 512
    max_prompts: int = 256
    max_queued_tokens: int = 262_144

    @property
    def short_tokens(self) -> int:
        """Most tokens of a prompt that counts as short."""
        return fairness.short_tokens(self.token_budget)


class PrefillBatcher:
    """First come, first served among short prompts and among long ones; `fairness` says how the two kinds share steps and blocks.

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

    def submit(self, prompt: PromptState, tokens_per_second: float = 0.0) -> None:
        """Queues a prompt; POOL_TOO_SMALL if no pool of this size ever holds it, QUEUE_FULL if too many or too long ones are here.

        When to come back is told by the speed with which tokens are computed; 0 if that is not known yet.
        """
        needed = self._blocks_for(prompt)
        if needed > self._allocator.num_blocks:
            message = f"the prompt needs {needed} KV blocks, this worker has {self._allocator.num_blocks} in all"
            raise TandemError(Reason.POOL_TOO_SMALL, message, metadata={"needed_blocks": str(needed)})
        excess = self._excess_tokens(prompt)
        if excess > 0:
            message = f"{self.num_prompts} prompts of {self.num_queued_tokens} tokens are already here"
            retry_after_s = max(MIN_RETRY_S, excess / tokens_per_second) if tokens_per_second > 0 else None
            raise TandemError(Reason.QUEUE_FULL, message, retry_after_s=retry_after_s)
        self._waiting.append(prompt)

    def _excess_tokens(self, prompt: PromptState) -> int:
        """Tokens to compute before there is a place for the prompt."""
        if self.num_prompts >= self._limits.max_prompts:
            return max(1, self.num_queued_tokens // self.num_prompts)
        if prompt.num_tokens <= self._limits.short_tokens or not self.num_prompts:
            return 0
        return self.num_queued_tokens + prompt.num_tokens - self._limits.max_queued_tokens

    def admit(self) -> list[PromptState]:
        """Gives blocks to waiting prompts, oldest first, until there is no room for the next; short ones may pass a long one."""
        admitted = []
        held_up: PromptState | None = None
        for prompt in tuple(self._waiting):
            if held_up is not None and not self._may_pass(prompt, held_up):
                continue
            if self._take_blocks(prompt):
                admitted.append(prompt)
                if held_up is not None:
                    held_up.num_passed_tokens += prompt.num_tokens
            elif held_up is None and self._is_long(prompt):
                held_up = prompt
            else:
                break
        self.num_admitted += len(admitted)
        return admitted

    def _take_blocks(self, prompt: PromptState) -> bool:
        """A long prompt leaves some blocks to short ones, unless nothing else runs or it has waited long enough."""
        exempt = not self._is_long(prompt) or not self._running or self._out_of_patience(prompt)
        if not exempt and self._allocator.num_free - self._blocks_for(prompt) < self._allocator.num_blocks // fairness.POOL_SHARE:
            return False
        try:
            blocks = self._allocator.allocate_prompt(prompt.token_ids, use_cache=prompt.use_prefix_cache)
        except OutOfBlocksError:
            return False
        prompt.block_ids = list(blocks.block_ids)
        prompt.num_cached_tokens = prompt.num_computed_tokens = prompt.num_scheduled_tokens = blocks.num_cached_tokens
        self._waiting.remove(prompt)
        self._running.append(prompt)
        return True

    def _may_pass(self, prompt: PromptState, held_up: PromptState) -> bool:
        return not self._is_long(prompt) and not self._out_of_patience(held_up)

    def _is_long(self, prompt: PromptState) -> bool:
        return prompt.num_tokens > self._limits.short_tokens

    def _out_of_patience(self, prompt: PromptState) -> bool:
        return prompt.num_passed_tokens >= fairness.PATIENCE * prompt.num_tokens

    def _blocks_for(self, prompt: PromptState) -> int:
        return -(-prompt.num_tokens // self._allocator.block_tokens)

    def expired(self, now: float) -> list[PromptState]:
        """Prompts whose deadline has passed, to be closed."""
        return [prompt for prompt in (*self._waiting, *self._running) if prompt.deadline <= now]

    def schedule(self) -> list[Chunk]:
        """The next step: packed chunks, `token_budget` tokens at most. `complete` must follow, in order."""
        chunks = list(self._pack())
        for chunk in chunks:
            chunk.prompt.num_scheduled_tokens += chunk.num_tokens
            chunk.prompt.num_flights += 1
        return chunks

    @property
    def settled(self) -> bool:
        """Whether the next step would be the same with prompts that are yet to come."""
        shares = self._shares()
        left_out = any(share < _remaining(prompt) for share, prompt in zip(shares, self._running, strict=True))
        only_short = all(_size(prompt) <= self._limits.short_tokens for prompt in self._running)
        return only_short and (left_out or sum(shares) >= self._limits.short_tokens)

    def _pack(self) -> Iterator[Chunk]:
        for prompt, num_tokens in zip(self._running, self._shares(), strict=True):
            if num_tokens > 0:
                yield Chunk(prompt, prompt.num_scheduled_tokens, num_tokens)

    def _shares(self) -> list[int]:
        sizes, remaining = map(_size, self._running), map(_remaining, self._running)
        return fairness.share_step(list(sizes), list(remaining), self._limits.token_budget)

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


def _size(prompt: PromptState) -> int:
    """Tokens that are not cached."""
    return prompt.num_tokens - prompt.num_cached_tokens


def _remaining(prompt: PromptState) -> int:
    """Tokens that no step has taken yet."""
    return prompt.num_tokens - prompt.num_scheduled_tokens

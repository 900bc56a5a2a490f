"""A prompt in the engine: what is asked, and what is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm.sampling import SampledToken, SampleRow
from llm.sampling_params import SamplingParams
from prefill_svc.batcher import PromptState
from tandem.engine_thread import Mailbox
from tandem.errors import TandemError


@dataclass(frozen=True)
class Admitted:
    """The prompt has its blocks; `num_cached_tokens` of it are computed already."""

    block_ids: Sequence[int]
    num_cached_tokens: int


@dataclass(frozen=True)
class Progress:
    """The KV of the first `num_computed_tokens` tokens is in the pool."""

    num_computed_tokens: int


@dataclass(frozen=True)
class Finished:
    """The first token, and when the prompt's first chunk began and the token was drawn (monotonic clock, ns)."""

    token: SampledToken
    prompt_logprobs: Sequence[SampledToken]
    started_ns: int
    finished_ns: int


@dataclass(frozen=True)
class Failed:
    """The engine failed, or the deadline has passed; nothing more will come."""

    error: TandemError


PrefillEvent = Admitted | Progress | Finished | Failed


@dataclass(eq=False)
class PrefillJob:
    """A request in the engine: what to compute, how to draw the first token, and where its events go."""

    prompt: PromptState
    num_prompt_tokens: int
    sampling: SamplingParams
    forbidden_token_ids: Sequence[int]
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    mailbox: Mailbox[PrefillEvent] = field(default_factory=Mailbox)
    started_ns: int = 0
    prompt_logprobs: list[SampledToken] = field(default_factory=list)

    def sample_row(self) -> SampleRow:
        return SampleRow(self.sampling, self.prompt.token_ids, self.num_prompt_tokens, self.forbidden_token_ids, self.num_logprobs)

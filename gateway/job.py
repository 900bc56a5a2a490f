"""The values that travel inside the gateway: one request, understood and checked, and what workers say about its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, every default filled in; see SamplingParams in generation.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Stopping:
    """When a completion ends. `end_token_ids` holds the model's own unless the request ignores them."""

    max_tokens: int
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    end_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class OutputOptions:
    """What to return beside the text; None means no log-probabilities."""

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class GenerationJob:
    """One request: valid, tokenized, with its seed. `deadline` is on the monotonic clock, in seconds."""

    request_id: str
    model_digest: str
    token_ids: Sequence[int]
    sampling: Sampling
    stopping: Stopping
    output: OutputOptions
    deadline: float


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token, or one of the prompt's, with the log-probabilities that were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(slots=True)
class Output:
    """The next piece of a completion for the client: `index` tokens came before it."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Handoff:
    """How the KV blocks came; `transport` is the number of the Transport enum."""

    transport: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Timings:
    """Consecutive phases of a request's wall time, in microseconds; see Timings in generation.proto."""

    tokenize_us: int
    gateway_queue_us: int
    prefill_queue_us: int
    prefill_us: int
    handoff_us: int
    decode_queue_us: int
    decode_us: int

    @property
    def wall_us(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True)
class Ending:
    """How a completion ended, what it counted and where the time went."""

    reason: FinishReason
    num_cached_tokens: int
    num_completion_tokens: int
    timings: Timings
    handoff: Handoff

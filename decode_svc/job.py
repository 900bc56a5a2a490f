"""A completion in the engine: what is asked, and what is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

from decode_svc.batcher import SequenceState
from llm.kv.copying import Event
from llm.sampling import SampledToken, SampleRow
from llm.sampling_params import SamplingParams
from tandem.engine_thread import Mailbox, Outlet
from tandem.errors import TandemError


class EndReason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class StopRule:
    """End tokens count from the `min_tokens`-th token of the completion on; `max_tokens` is its greatest length."""

    end_token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int

    def ends_at(self, token_id: int, num_completion_tokens: int) -> EndReason | None:
        """Whether a completion of that many tokens, the last being `token_id`, is complete."""
        if token_id in self.end_token_ids and num_completion_tokens > self.min_tokens:
            return EndReason.STOP
        return EndReason.LENGTH if num_completion_tokens >= self.max_tokens else None


@dataclass(slots=True)
class Drawn:
    """A token; `index` tokens of the completion came before it. Left as made; not frozen, as llm.batch.SequenceSlice says."""

    index: int
    token: SampledToken


@dataclass(frozen=True)
class Ended:
    """The completion is complete."""

    reason: EndReason


@dataclass(frozen=True)
class Failed:
    """The engine failed, or the deadline has passed; nothing more will come."""

    error: TandemError


DecodeEvent = Drawn | Ended | Failed


@dataclass(eq=False)
class DecodeJob:
    """A request in the engine, which sends its events to `outlet`: to `mailbox`, unless another was set before the job began.

    Times are of the monotonic clock, ns; 0 until they happen.
    """

    sequence: SequenceState
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_rule: StopRule
    num_logprobs: int | None = None
    mailbox: Mailbox[DecodeEvent] = field(default_factory=Mailbox)
    ready_ns: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    after: Sequence[Event] = ()
    """What brings the KV of a sequence that is arriving."""
    held: SampledToken | None = None
    """What a step drew for such a sequence: nobody's before the KV is verified."""
    outlet: Outlet[DecodeEvent] = field(init=False)

    def __post_init__(self) -> None:
        self.outlet = self.mailbox

    @property
    def num_completion_tokens(self) -> int:
        return len(self.sequence.token_ids) - self.num_prompt_tokens

    def sample_row(self, num_tokens: int) -> SampleRow:
        """How the token after the first `num_tokens` is drawn."""
        if num_tokens - self.num_prompt_tokens >= self.stop_rule.min_tokens:
            return self._free_row
        return replace(self._free_row, forbidden_token_ids=tuple(self.stop_rule.end_token_ids))

    @cached_property
    def _free_row(self) -> SampleRow:
        """Any token may be drawn. Made once; the tokens that it knows grow with the sequence's."""
        return SampleRow(self.sampling, self.sequence.token_ids, self.num_prompt_tokens, num_logprobs=self.num_logprobs)

    def start_over(self, sequence: SequenceState) -> None:
        """Forgets what was drawn from KV that was not good."""
        self.sequence, self.after, self.held, self.started_ns = sequence, (), None, 0
        vars(self).pop("_free_row", None)  # it knows the other sequence's tokens

    def append(self, token_id: int) -> EndReason | None:
        """Adds a token to the completion and says whether that ends it."""
        self.sequence.token_ids.append(token_id)
        return self.stop_rule.ends_at(token_id, self.num_completion_tokens)

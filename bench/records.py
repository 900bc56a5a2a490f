"""What a client saw of one request. Plain values, so that they travel between processes as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The error of a request that was given up because its load was over.
UNFINISHED = "UNFINISHED"


@dataclass
class Record:
    """One request; moments in microseconds after the load's beginning, on the clock that all processes share.

    `arrivals_us` has one moment for each message with tokens, `counts` how many came in it. `error` is the failure's name, or
    empty. `phases_us` is what the server says of where the time went.
    """

    number: int
    prompt_tokens: int
    sent_us: int
    late_us: int = 0
    arrivals_us: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    cached_tokens: int = 0
    phases_us: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals_us[0] - self.sent_us) / 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds a token after the first message's; None if there was one message only."""
        later = self.completion_tokens - self.counts[0]
        return (self.arrivals_us[-1] - self.arrivals_us[0]) / 1e3 / later if later > 0 else None

    @property
    def gaps_ms(self) -> list[float]:
        """Between messages: what a reader waits for more text."""
        return [(later - earlier) / 1e3 for earlier, later in zip(self.arrivals_us, self.arrivals_us[1:], strict=False)]

    def note_arrival(self, moment_us: int, num_tokens: int) -> None:
        self.arrivals_us.append(moment_us)
        self.counts.append(num_tokens)

    def fail_unless_complete(self, wanted: int) -> None:
        """A stream that ended well but did not bring the tokens asked for is a failure too."""
        if not self.error and self.completion_tokens != wanted:
            self.error = "INCOMPLETE"


@dataclass
class Measurement:
    """What one sending process, or all of them together, saw of one load. `lags_us`: how late its event loop woke up."""

    records: list[Record] = field(default_factory=list)
    lags_us: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measurement":
        return cls([Record(**record) for record in value["records"]], list(value["lags_us"]))

    @classmethod
    def together(cls, parts: Sequence["Measurement"]) -> "Measurement":
        return cls([each for part in parts for each in part.records], [lag for part in parts for lag in part.lags_us])

"""What one seed asks for: how the suite is set up, what clients want, and what goes wrong when."""

from dataclasses import dataclass, field
from enum import Enum

POISON = 1
"""A token that no one draws; a prompt with it breaks the engine that computes it."""

ROOMY_BLOCKS = 64
"""More than all requests of a scenario take together, as a rule."""

SHORT_TOKENS = 4
"""At most, of the short prompt in a flood of long ones."""


class Fault(Enum):
    """What can go wrong, apart from what clients do."""

    KILL = "kill"
    VANISH = "vanish"  # killed, and nobody is told: the machine went dark
    FREEZE = "freeze"
    FREEZE_READER = "freeze while reading"  # in the middle of a copy out of a producer's memory
    CUT = "cut"  # one direction or both
    DRAIN = "drain"
    CORRUPT = "corrupt"  # some bit of a block on its way
    LOSE_RELEASES = "lose releases"
    STEP_CLOCK = "step clock"  # the wall clock of one host, by `count` seconds
    POISON = "poison"


@dataclass(frozen=True)
class Disturbance:
    """A fault: `after_events` events after the first request, of `target`, and of `other` where two are concerned."""

    fault: Fault
    after_events: int
    target: str = ""
    other: str = ""
    lasts_s: float = 0.0
    both_ways: bool = True
    count: int = 1


@dataclass(frozen=True)
class Wish:
    """One request and how its client behaves. Times in seconds from the beginning; `cancel_after_events` counts from its start."""

    number: int
    client: str
    starts_at: float
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    timeout_s: float | None = None
    cancel_after_events: int | None = None
    read_pause_s: float = 0.0
    in_a_flood: bool = False

    @property
    def poisonous(self) -> bool:
        return POISON in self.prompt


@dataclass(frozen=True)
class Scenario:
    """All of it."""

    seed: int
    prefills: tuple[str, ...]
    decodes: tuple[str, ...]
    prefill_blocks: int
    decode_blocks: int
    token_budget: int
    max_prompts: int
    max_batch: int
    max_sequences: int
    max_running: int
    max_queued: int
    lease_s: float
    prefix_cache: bool
    transports: tuple[str, ...]
    step_s: float
    device: bool
    slow_clients: tuple[str, ...]
    wishes: tuple[Wish, ...]
    disturbances: tuple[Disturbance, ...] = field(default=())

    @property
    def harm(self) -> tuple[Disturbance, ...]:
        """What goes wrong and may cost something. A wall clock that is set must not: all time is measured by the monotonic one."""
        return tuple(each for each in self.disturbances if each.fault is not Fault.STEP_CLOCK)

    @property
    def workers(self) -> tuple[str, ...]:
        return self.prefills + self.decodes

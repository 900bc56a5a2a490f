"""Failpoints: named places in a worker at which a test may crash it, hold it or make it fail.

Product code has no hooks. `python -m tests.faults.launch` wraps these places before it starts the service, as the variable
FAULTS_POINTS tells it: points separated by ";", each PLACE[@ARGUMENTS]=ACTION.

PLACE@N fires the N-th time the place is reached (from 1; default 1), PLACE@N+ every time from then on, PLACE@%N every N-th time.
`prompt@1,2,3` fires whenever a step computes these tokens in a row. Actions: `crash` (SIGKILL to itself), `sleep:SECONDS` (holds
the calling thread), `raise` (RuntimeError), `refuse` (MemoryError, as a failed allocation), `flip` (at the place `wire` only: one
bit of one KV block changes on its way).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PLACES = {
    "prefill_svc": (
        "admit",
        "step.before",
        "step.after",
        "prompt",
        "blocks.before",
        "blocks.after",
        "finish",
        "first_token",
        "wire",
    ),
    "decode_svc": ("reserve", "step.before", "step.after", "prompt", "pull.before", "pull.after", "activate"),
    "gateway": (),
}
ACTIONS = ("crash", "sleep", "raise", "refuse", "flip")
VARIABLE = "FAULTS_POINTS"


@dataclass
class Failpoint:
    """One armed place. Counts how often it was reached; used by whatever thread gets there."""

    place: str
    action: str
    seconds: float = 0.0
    first: int = 1
    lasting: bool = False
    every: bool = False
    tokens: tuple[int, ...] = ()
    count: int = field(default=0, compare=False)

    def due(self, tokens: Sequence[int] = ()) -> bool:
        """Counts, and says whether it is time for the harm."""
        if self.tokens:
            return _contains(tokens, self.tokens)
        self.count += 1
        if self.every:
            return self.count % self.first == 0
        return self.count == self.first or (self.lasting and self.count > self.first)

    def act(self) -> None:
        match self.action:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(self.seconds)
            case "refuse":
                raise MemoryError(f"failpoint {self.place}")
            case _:
                raise RuntimeError(f"failpoint {self.place}")


def parse(text: str, role: str) -> list[Failpoint]:
    """From FAULTS_POINTS. Raises ValueError for a place that the role lacks, or an unknown action."""
    return [_parse_one(part.strip(), role) for part in text.split(";") if part.strip()]


def _parse_one(text: str, role: str) -> Failpoint:
    where, separator, what = text.partition("=")
    place, _, arguments = where.partition("@")
    action, _, seconds = what.partition(":")
    if not separator or place not in PLACES[role] or action not in ACTIONS:
        raise ValueError(f"{text!r} is not PLACE[@ARGUMENTS]=ACTION with a place of {role}: {', '.join(PLACES[role])}")
    point = Failpoint(place, action, float(seconds or 0))
    if place == "prompt":
        point.tokens = tuple(int(token) for token in arguments.split(","))
    elif arguments:
        point.first, point.lasting, point.every = int(arguments.strip("%+")), arguments.endswith("+"), arguments.startswith("%")
    return point


def gate_of(points: Sequence[Failpoint], place: str) -> Callable[[Sequence[int]], None]:
    """What a wrapped place calls when it is reached."""
    here = [point for point in points if point.place == place]

    def reached(tokens: Sequence[int] = ()) -> None:
        for point in here:
            if point.due(tokens):
                point.act()

    return reached


def _contains(tokens: Sequence[int], wanted: tuple[int, ...]) -> bool:
    width = len(wanted)
    return any(tuple(tokens[start : start + width]) == wanted for start in range(len(tokens) - width + 1))

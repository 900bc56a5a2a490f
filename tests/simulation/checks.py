"""Many short runs in one process, most of which would else be the start: of all regressions, and without each protection."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tests.simulation import regressions, worker
from tests.simulation.draw import scenario

SEEDS = 100
"""Tried for each protection."""


def regressions_hold() -> int:
    """Prints a line for each: its name and "held", or what was violated. The exit status."""
    names, held = regressions.names(), True
    with _quiet_simulation():
        for name in names:
            violations = [text for outcome in worker.outcomes(regressions.load(name).scenarios) for text in outcome.violations]
            print(name, f"violated {violations[0]!r}" if violations else "held", flush=True)
            held = held and not violations
    return 0 if held else 1


def noticed(asked: Iterable[str]) -> int:
    """Of each "NAME=SEED" prints the name and the first seed from that on that fails without the protection, and what it saw. The
    exit status is 0 if there is one for each."""
    found = [_noticed(*each.split("=")) for each in asked]
    return 0 if all(found) else 1


def _noticed(name: str, first: str) -> bool:
    with _quiet_simulation(name):
        for outcome in worker.outcomes(map(scenario, range(int(first), int(first) + SEEDS))):
            if outcome.violations:
                print(name, f"seed {outcome.seed}: {outcome.violations[0][:200]!r}", flush=True)
                return True
    print(name, f"nothing in {SEEDS} seeds from {first} on", flush=True)
    return False


@contextmanager
def _quiet_simulation(without: str = "") -> Iterator[None]:
    logging.disable(logging.WARNING)
    with worker.simulated(without):
        yield

"""Runs seeds in this process: the product's modules simulated, memory kept small, what a seed gave as one line of JSON."""

import gc
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.simulation.large_pages import use_large_pages
from tests.simulation.scenario import Scenario

PRODUCT_LOGGERS = ("tandem", "gateway", "prefill_svc", "decode_svc", "kvtransfer", "llm")


WARM_UP_SEEDS = 2
"""After these, nearly all memory that seeds need is there."""

SEEDS_PER_COLLECTION = 5

READY = "ready\n"
"""What a process says once it takes seeds."""


@dataclass
class Outcome:
    """What became of a seed. `digest` stands for all that happened in it, and when."""

    seed: int
    num_events: int = 0
    digest: int = 0
    violations: list[str] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line: str | bytes) -> "Outcome":
        fields = json.loads(line)
        return cls(**{**fields, "injected": Counter(fields["injected"]), "requests": Counter(fields["requests"])})


@contextmanager
def simulated(without: str = "") -> Iterator[None]:
    """The product's modules as the simulation needs them, and without one of their protections if it is named."""
    from tests.simulation import mutations, product, simulation  # noqa: F401 - loads all of the product
    from tests.simulation.seams import Seams, simulated_modules

    # What a killed process had not begun is none of its failures.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    sys.unraisablehook = lambda _: None

    def further(seams: Seams) -> None:
        product.replace(seams)
        if without:
            mutations.MUTATIONS[without](seams)

    with simulated_modules(further):
        yield


def outcomes(scenarios: Iterable[Scenario]) -> Iterator[Outcome]:
    """Of one after the other; within `simulated`.

    What a seed leaves behind is full of cycles. It is collected soon, so that the next ones find the same memory in the
    processor's caches; the modules, which stay, are left out of that.
    """
    from tests.simulation.simulation import run

    gc.disable()
    gc.collect()
    gc.freeze()
    for index, wanted in enumerate(scenarios):
        yield run(wanted)
        if index % SEEDS_PER_COLLECTION == 0:
            gc.collect()
        if index + 1 == WARM_UP_SEEDS:
            use_large_pages()


def serve(without: str) -> None:
    """Runs the ranges of seeds that come in by standard input, a line "first count" each, and prints a line for each seed."""
    gc.disable()  # modules come to stay
    from tests.simulation.draw import scenario

    logging.disable(logging.WARNING)
    # Nobody reads where a record was made, or by whom; to find that out is most of what one takes.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    with simulated(without):
        print(READY, end="", flush=True)
        for outcome in outcomes(map(scenario, _asked_for())):
            print(outcome.to_json(), flush=True)


def _asked_for() -> Iterator[int]:
    for line in sys.stdin:
        first, count = map(int, line.split())
        yield from range(first, first + count)


def replay(wanted: Scenario, without: str) -> Outcome:
    """With a log of all that happens."""
    from tests.simulation.simulation import run

    for name in PRODUCT_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    with simulated(without):
        return run(wanted, verbose=print)

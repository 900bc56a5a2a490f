"""Keeps the interpreter from holding up a process that serves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ALLOCATIONS, _YOUNG, _MIDDLE = 500, 800, 10
"""Between looks at the youngest objects, and looks at each generation until one at the next older. A look at the youngest takes as
long as they are many, and stops all threads: with 5,000 it was 2 to 4 ms once a second, with 500 it is 0.3. Looks at the middle
generation, which with Python's own numbers (700 or 2,000, 10 and 10) take a loaded worker 3 to 9 ms once a second, are seldom.
Each call of a gRPC server leaves a cycle of some 3 KB (its search for the handler) for the youngest."""


@contextmanager
def without_collection() -> Iterator[None]:
    """For imports: they leave next to nothing to collect, and looking for it takes a sixth of the time that torch's take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def avoid_pauses() -> None:
    """Call it once, when everything is loaded.

    What is there by then lives as long as the process: the garbage collector need not look through it again, which takes it over a
    hundred milliseconds with torch in memory. From then on it seldom looks at what is not young: requests hardly leave cycles that
    live that long.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, _YOUNG, _MIDDLE)

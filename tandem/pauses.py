"""Keeps the interpreter from holding up a process that serves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ALLOCATIONS, _YOUNG, _MIDDLE = 5_000, 80, 10
"""Between looks at the youngest objects, and looks at each generation until one at the next older. A look at the youngest is short,
and each call of a gRPC server leaves a cycle of some 3 KB (its search for the handler) for one. Python's own numbers are 700 or
2,000, 10 and 10, with which a loaded worker spends 3 to 9 ms in a look at the middle generation once a second, between steps."""


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

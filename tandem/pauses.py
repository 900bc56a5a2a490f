"""Keeps the interpreter from holding up a process that serves."""

import gc


def avoid_pauses() -> None:
    """Call it once, when everything is loaded.

    What is there by then lives as long as the process: the garbage collector need not look through it again, which takes it over a
    hundred milliseconds with torch in memory.
    """
    gc.collect()
    gc.freeze()

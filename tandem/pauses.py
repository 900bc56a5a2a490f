"""Keeps the interpreter from holding up a process that serves."""

import gc
import sys

_SWITCH_S = 0.0005


def avoid_pauses() -> None:
    """Call it once, when everything is loaded.

    What is there by then lives as long as the process: the garbage collector need not look through it again, which takes it over a
    hundred milliseconds with torch in memory. And a thread that has computed for `_SWITCH_S` lets others on, instead of for 5 ms:
    an engine's thread that wants to launch its next step would wait that long for the event loop.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)

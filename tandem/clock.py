"""Spans of time are measured on the monotonic clock; the wall clock is only for people."""

import time


def wall_ns(monotonic_ns: int) -> int:
    """The wall-clock time, ns since the epoch, of a moment of `time.monotonic_ns()`."""
    return time.time_ns() - time.monotonic_ns() + monotonic_ns

"""Which processor cores there are to compute on."""

import os


def usable_cores() -> list[int]:
    """Those that this process may use, by number; all of them where the system sets no such limits."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))

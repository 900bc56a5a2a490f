"""How many processor cores there are to compute on."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def num_usable_cores(root: Path = Path("/")) -> int:
    """Those that this process may use, or as many as its control groups give it the time of: a container may see 64 cores and be
    stopped for most of each moment once it has used two. `root`: of the file system with /proc and /sys."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *_granted(root)])))


def _granted(root: Path) -> Iterator[float]:
    """Cores' worth of time, by each group that this process is in, where that is limited."""
    for group in _groups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = _limit(group)
            if quota.isdecimal():  # "max" and -1 are no limit
                yield int(quota) / int(period)


def _limit(group: Path) -> tuple[str, str]:
    """Microseconds of processor time in a period of so many. OSError or ValueError if it does not say."""
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
        return quota, period
    return (group / "cpu.cfs_quota_us").read_text().strip(), (group / "cpu.cfs_period_us").read_text()


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups and of those that they are part of. In a container only what is the top there may be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        top = root / "sys/fs/cgroup"
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        here = PurePosixPath(path.lstrip("/"))
        yield from ((top / ("" if number == "0" else "cpu") / folder) for folder in (here, *here.parents))

"""What tells a running kernel, and a process of it, from others that have or had its name."""

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Identifies the running kernel, which this process does not survive; empty where there is no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since the kernel did; 0 if it is not visible from here."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0

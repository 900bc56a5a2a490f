"""Notices that the parent process is gone, however it ended: the other side of standard input closes with it."""

import os
import threading
from collections.abc import Callable

_on_end: Callable[[], None] | None = None


def watch_parent(on_end: Callable[[], None]) -> None:
    """Calls `on_end` in a thread at the end of standard input. A second call replaces what the first said."""
    global _on_end
    begun, _on_end = _on_end is not None, on_end
    if not begun:
        threading.Thread(target=_wait, name="parent-watch", daemon=True).start()


def leave_at_once() -> None:
    """For the time in which nothing is served yet and nothing needs an orderly end."""
    os._exit(1)


def _wait() -> None:
    # The raw descriptor: a thread that blocks inside sys.stdin would hold its lock when the interpreter ends.
    while os.read(0, 4096):
        pass
    if _on_end is not None:
        _on_end()

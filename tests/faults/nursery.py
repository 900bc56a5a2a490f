"""`python -m tests.faults.nursery`: forks processes of the suite from one that has torch in memory already.

A worker then starts in a fraction of a second instead of three seconds of imports, so that hundreds of kills fit into minutes. gRPC
is not imported here: it must not be forked. Reads a JSON object a line, {"name", "role", "argv", "env", "log", "namespace"}, and
writes {"name", "pid"} for each birth and {"name", "pid", "status"} for each death. At the end of its input it kills its children.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import Any

PRELOADED = (
    "numpy",
    "torch",
    "msgpack",
    "xxhash",
    "psutil",
    "llm.kv.pool",
    "llm.kv.allocator",
    "llm.sampling",
    "tests.fakes.runner",
)
CLONE_NEWNET = 0x40000000


class Nursery:
    """Single-threaded; owns its children."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._wake_out, self._wake_in = socket.socketpair()
        for each in (self._wake_in, self._wake_out):
            each.setblocking(False)
        # Children read the end of their standard input when this process is gone.
        self._life_out, self._life_in = os.pipe()

    def serve(self) -> dict[str, Any] | None:
        """In this process: returns None at the end of the input. In a child: returns what it is to become."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_in.fileno())
        selector = selectors.DefaultSelector()
        selector.register(0, selectors.EVENT_READ)
        selector.register(self._wake_out, selectors.EVENT_READ)
        rest = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if self._wake_out.fileno() in ready:
                self._reap()
            if 0 in ready:
                data = os.read(0, 1 << 16)
                if not data:
                    return self._end()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if self._fork(order) == 0:
                        selector.close()
                        return order  # type: ignore[no-any-return]

    def _fork(self, order: dict[str, Any]) -> int:
        pid = os.fork()
        if pid:
            self._names[pid] = order["name"]
            _say(name=order["name"], pid=pid)
            return pid
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.dup2(self._life_out, 0)
        for fd in (self._life_out, self._life_in):
            os.close(fd)
        for each in (self._wake_in, self._wake_out):
            each.close()
        return 0

    def _reap(self) -> None:
        while True:
            try:
                self._wake_out.recv(4096)
            except BlockingIOError:
                break
        for pid in list(self._names):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                _say(name=self._names.pop(pid), pid=pid, status=os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        for pid in self._names:
            os.kill(pid, signal.SIGKILL)
        for pid in self._names:
            os.waitpid(pid, 0)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def become(order: dict[str, Any]) -> None:
    """Turns this fresh child into a process of the suite."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    if order.get("namespace"):
        enter_namespace(order["namespace"])
    os.environ.update(order["env"])
    from tests.faults import launch

    launch.run(order["role"], order["argv"], os.environ)


def enter_namespace(name: str) -> None:
    """Moves this process into a named network namespace."""
    fd = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    os.close(fd)


def main() -> None:
    if "--preload" in sys.argv:
        for name in PRELOADED:
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = Nursery().serve()
    if order is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        become(order)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

"""Stand for the modules `socket` and `selectors`."""

import selectors as real_selectors
import socket as real_socket
from types import SimpleNamespace
from typing import Any

from tests.simulation import threads
from tests.simulation.loop import Violation
from tests.simulation.sockets import Socket, join


class Selector:
    """selectors.DefaultSelector, for reading."""

    def __init__(self) -> None:
        self._keys: dict[Any, SimpleNamespace] = {}
        self._thread: threads.Thread | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> SimpleNamespace:
        key = self._keys[fileobj] = SimpleNamespace(fileobj=fileobj, events=events, data=data, fd=fileobj.fileno())
        fileobj.selectors.append(self)
        return key

    def unregister(self, fileobj: Any) -> SimpleNamespace:
        fileobj.selectors.remove(self)
        return self._keys.pop(fileobj)

    def get_map(self) -> dict[Any, SimpleNamespace]:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[SimpleNamespace, int]]:
        loop, thread = threads.loop(), threads.current()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            ready = [(key, real_selectors.EVENT_READ) for key in self._keys.values() if key.fileobj.readable()]
            if ready or (deadline is not None and loop.time() >= deadline):
                return ready
            if thread is None:
                raise Violation("an event loop was blocked by a selector")
            self._thread = thread
            if deadline is not None:
                thread.resume(deadline - loop.time())
            thread.park()
            self._thread = None

    def wake(self) -> None:
        if self._thread is not None:
            self._thread.resume()

    def close(self) -> None:
        for fileobj in list(self._keys):
            self.unregister(fileobj)


class SocketModule:
    """Stands for the module `socket`."""

    socket = Socket
    timeout = TimeoutError
    error = OSError
    gaierror = real_socket.gaierror

    def __getattr__(self, name: str) -> Any:
        if name.isupper():
            return getattr(real_socket, name)
        raise AttributeError(f"socket.{name} is not simulated")

    @staticmethod
    def getaddrinfo(host: str, port: Any, *_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", (host, int(port or 0)))]

    @staticmethod
    def create_server(address: tuple[str, int], **_: Any) -> Socket:
        sock = Socket()
        sock.bind(address)
        sock.listen()
        return sock

    @staticmethod
    def create_connection(address: tuple[str, int], timeout: float | None = None, **_: Any) -> Socket:
        sock = Socket()
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    @staticmethod
    def socketpair(*_: Any, **__: Any) -> tuple[Socket, Socket]:
        one, other = Socket(), Socket()
        join(one, other, 0)
        return one, other


SELECTORS = SimpleNamespace(DefaultSelector=Selector, EVENT_READ=real_selectors.EVENT_READ, EVENT_WRITE=real_selectors.EVENT_WRITE)

"""Puts simulated clocks, threads, sockets, random numbers and gRPC into the product's modules, and takes them out again.

The product is not changed: it names what it uses (`time.monotonic()`, `ThreadPoolExecutor(2)`, `clock=time.monotonic`), and here
these names are made to mean something else for as long as a simulation runs.
"""

import asyncio
import contextlib
import random
import secrets
import selectors
import socket
import sys
import threading
import time
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import grpc.aio

from tests.simulation import threads
from tests.simulation.executor import SimulatedExecutor
from tests.simulation.socket_module import SELECTORS, SocketModule

PACKAGES = ("tandem", "gateway", "prefill_svc", "decode_svc", "kvtransfer", "llm.kv")


def _randomness() -> Random:
    return threads.loop().random


class _Random:
    """Stands for the module `random`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_randomness(), name)


class _Secrets:
    """Stands for the module `secrets`."""

    @staticmethod
    def token_hex(num_bytes: int = 32) -> str:
        return f"{_randomness().getrandbits(8 * num_bytes):0{2 * num_bytes}x}"

    @staticmethod
    def randbits(count: int) -> int:
        return _randomness().getrandbits(count)


class _Uuid:
    """Stands for the module `uuid`."""

    UUID = uuid.UUID

    @staticmethod
    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=_randomness().getrandbits(128), version=4)


TIME, THREADING = threads.Time(), threads.Threading()

REPLACEMENTS: list[tuple[Any, Any]] = [
    (time, TIME),
    (time.monotonic, threads.Time.monotonic),
    (time.monotonic_ns, threads.Time.monotonic_ns),
    (time.perf_counter, threads.Time.perf_counter),
    (time.time, threads.Time.time),
    (time.sleep, threads.Time.sleep),
    (threading, THREADING),
    (threading.Thread, threads.Thread),
    (threading.Lock, threads.Lock),
    (threading.Event, threads.Event),
    (ThreadPoolExecutor, SimulatedExecutor),
    (socket, SocketModule()),
    (selectors, SELECTORS),
    (random, _Random()),
    (secrets, _Secrets()),
    (uuid, _Uuid()),
]


def _server(*arguments: Any, **options: Any) -> Any:
    return threads.loop().rpc.server(*arguments, **options)


def _insecure_channel(*arguments: Any, **options: Any) -> Any:
    return threads.loop().rpc.insecure_channel(*arguments, **options)


class Seams:
    """Remembers what was there before, so that `close` puts it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._replacements = {id(original): replacement for original, replacement in REPLACEMENTS}

    def set(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def on_close(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def replace_in(self, module: types.ModuleType) -> None:
        for name, value in list(vars(module).items()):
            replacement = self._replacements.get(id(value))
            if replacement is not None:
                self.set(module, name, replacement)
            elif isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                self._replace_defaults(value)
            elif isinstance(value, type) and value.__module__ == module.__name__:
                if any(id(base) in self._replacements for base in value.__bases__):
                    self.set(value, "__bases__", tuple(self._replacements.get(id(base), base) for base in value.__bases__))
                for member in vars(value).values():
                    function = getattr(member, "__func__", member)
                    if isinstance(function, types.FunctionType):
                        self._replace_defaults(function)

    def _replace_defaults(self, function: types.FunctionType) -> None:
        defaults, named = function.__defaults__ or (), function.__kwdefaults__ or {}
        if any(id(value) in self._replacements for value in defaults):
            self.set(function, "__defaults__", tuple(self._replacements.get(id(value), value) for value in defaults))
        if any(id(value) in self._replacements for value in named.values()):
            self.set(function, "__kwdefaults__", {key: self._replacements.get(id(value), value) for key, value in named.items()})


@contextlib.contextmanager
def simulated_modules(further: Callable[[Seams], None]) -> Iterator[None]:
    """All loaded modules of the product, and what `further` sets."""
    seams = Seams()
    try:
        for name, module in list(sys.modules.items()):
            if name.startswith(PACKAGES) and "_pb2" not in name:
                seams.replace_in(module)
        for name in ("_all_tasks", "_scheduled_tasks"):
            # Weak sets in Python code, to which asyncio adds every task; nobody asks a simulation for all tasks of a loop.
            if isinstance(tasks := getattr(asyncio.tasks, name, None), weakref.WeakSet):
                tasks.add = lambda task: None
                seams.on_close(lambda tasks=tasks: tasks.__dict__.pop("add"))
        seams.set(grpc.aio, "server", _server)
        seams.set(grpc.aio, "insecure_channel", _insecure_channel)
        further(seams)
        yield
    finally:
        seams.close()

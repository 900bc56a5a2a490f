"""The server that every process of the suite runs: health, reflection, the interceptor, signals and an ordered end."""

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem import health
from tandem.interceptor import CallCounts, Interceptor
from tandem.parent_watch import watch_parent
from tandem.tracing import flush_tracing

logger = logging.getLogger(__name__)

DRAIN_SHARE = 0.7
"""Of the grace: how long calls may go on before they are told to go elsewhere. The rest is for them to end, and to be heard."""

AsyncStep = Callable[[], Awaitable[None]]


class ListenError(OSError):
    """The address cannot be bound."""


class StartError(Exception):
    """The process cannot start as it was told to, and trying again would not help; the message says what to do."""


@dataclass(frozen=True)
class ServerSettings:
    """Where and how a process listens."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=0, metadata={"help": "port to listen on; 0 takes a free one", "minimum": 0, "maximum": 65535})
    grace_s: float = field(default=10.0, metadata={"help": "seconds that running calls get to end at shutdown", "minimum": 0})
    exit_with_parent: bool = field(default=False, metadata={"help": "stop at the end of standard input, so when the parent dies"})
    reflection: bool = field(default=True, metadata={"help": "serve gRPC reflection"})
    max_concurrent_streams: int = field(default=1000, metadata={"help": "calls at once per connection", "minimum": 1})


class Server:
    """A gRPC server with everything around it. Made and used on the event loop.

    Health: "" is SERVING as long as the process lives; each added service, and "{name}.ready", follow `set_ready`.
    """

    def __init__(self, name: str, settings: ServerSettings) -> None:
        self._name = name
        self._settings = settings
        self._interceptor = Interceptor()
        self._server = grpc.aio.server(interceptors=[self._interceptor], options=server_options(settings.max_concurrent_streams))
        self._health = health.HealthServicer()
        self._service_names: list[str] = []
        self._stopping = asyncio.Event()
        self._ready = False
        self._port = 0

    @property
    def port(self) -> int:
        """The bound port; 0 before `start`."""
        return self._port

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def stopping(self) -> bool:
        """Whether the shutdown has begun."""
        return self._stopping.is_set()

    def counts_of(self, method: str) -> CallCounts:
        """Calls of one method, by its full name."""
        return self._interceptor.counts[method]

    @property
    def counts(self) -> Mapping[str, CallCounts]:
        """Calls by full method name, "/tandem.worker.v1.PrefillService/Prefill"."""
        return self._interceptor.counts

    def add(self, add_function: Callable[[Any, grpc.aio.Server], None], servicer: object, service_name: str) -> None:
        """Serves `servicer`, by its generated `add_XServicer_to_server`; before `start` only."""
        add_function(servicer, self._server)
        self._service_names.append(service_name)

    async def start(self) -> int:
        """Listens and answers, not ready yet; returns the port. ListenError if the address is taken.

        From here on signals, and the parent's end, lead to the ordered shutdown of `run_until_stopped`.
        """
        self._watch_for_the_end()
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health, health.SERVICE_NAME)
        if self._settings.reflection:
            reflection.enable_server_reflection((*self._service_names, reflection.SERVICE_NAME), self._server)
        self._port = self._bind()
        self.set_ready(False)
        await self._server.start()
        return self._port

    def set_ready(self, ready: bool) -> None:
        """Whether this process takes work; health watchers learn it at once. Once the shutdown has begun it takes none."""
        ready = ready and not self.stopping
        self._ready = ready
        for service in (*self._service_names, f"{self._name}.ready"):
            self._health.set(service, ready)

    def stop(self) -> None:
        """Begins the shutdown that `run_until_stopped` waits for: not ready from this moment on. Idempotent."""
        self._stopping.set()
        self.set_ready(False)

    async def run_until_stopped(self, drain: AsyncStep, close: AsyncStep) -> None:
        """Serves until SIGTERM, SIGINT, `stop`, or with `exit_with_parent` the end of standard input; then ends in order.

        Not ready; `drain()`, which stops admitting and waits for what runs, for most of `grace_s`; calls that have not ended by
        then end with DRAINING, so that the caller can go on elsewhere; the server stops; `close()`, which frees engines and pools;
        spans are flushed. A step that raises does not keep the later ones from running.
        """
        await self._stopping.wait()
        await self._shut_down(drain, close)

    async def _shut_down(self, drain: AsyncStep, close: AsyncStep) -> None:
        deadline = time.monotonic() + self._settings.grace_s
        logger.info("%s: shutting down", self._name)
        async with contextlib.AsyncExitStack() as steps:
            steps.push_async_callback(asyncio.to_thread, flush_tracing)
            steps.push_async_callback(close)
            steps.push_async_callback(self._stop_server, deadline)
            await self._drain(drain)

    async def _drain(self, drain: AsyncStep) -> None:
        try:
            async with asyncio.timeout(self._settings.grace_s * DRAIN_SHARE):
                await drain()
        except TimeoutError:
            share_s = self._settings.grace_s * DRAIN_SHARE
            logger.warning("%s: not drained within %.1f s; what still runs goes on elsewhere", self._name, share_s)
            await self._interceptor.dismiss_requests(self._settings.grace_s - share_s)

    async def _stop_server(self, deadline: float) -> None:
        self._interceptor.dismiss_observers()
        await self._server.stop(max(deadline - time.monotonic(), 0.1))

    def _bind(self) -> int:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"{host}:{self._settings.port}"
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {address}; is the port taken, or the host not this machine's?") from error
        return port

    def _watch_for_the_end(self) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        if self._settings.exit_with_parent:
            watch_parent(lambda: _call_soon(loop, self.stop))


def server_options(max_concurrent_streams: int) -> tuple[tuple[str, int], ...]:
    """gRPC's server arguments. A frozen client is noticed after keepalive plus ping timeout, 12 s."""
    return (
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", max_concurrent_streams),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 2_000),
        ("grpc.http2.ping_timeout_ms", 2_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Below the fastest keepalive of our own channels (1 s), or gRPC ends their connections with too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
    )


def run(main: Coroutine[Any, Any, int | None]) -> NoReturn:
    """Runs a process's main coroutine on uvloop and exits with its result; None is 0, an exception a traceback and 1."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            raise SystemExit(runner.run(main) or 0)
        except ListenError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        except StartError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it exists, else (on Windows) asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed already
        loop.call_soon_threadsafe(function)

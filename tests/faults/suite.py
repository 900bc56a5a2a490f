"""The real suite as processes that may be killed, frozen, drained and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil

from tandem.api.v1 import operations_pb2, operations_pb2_grpc
from tandem.channels import open_channel
from tests.faults.members import FAKE_MODEL, ROLES, Death, Member, ProxyLinks, Shape
from tests.faults.network import Network
from tests.faults.proxy import Link

START_LIMIT_S = 120.0


class Suite:
    """`async with Suite(shape, directory)`: all members serve. Leaving the block ends every process, whatever happened.

    `environment` is added to that of all members, from the moment when they are forked.
    """

    def __init__(
        self,
        shape: Shape,
        directory: Path,
        network: Network | None = None,
        *,
        proxied: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._nursery_environment = {**os.environ, **(environment or {})}
        self.shape = shape
        self.directory = directory
        self.network = network
        self.deaths: list[Death] = []
        self.members = {name: self._place(name, proxied) for name in shape.names}
        self.links = ProxyLinks(self.members) if proxied else None
        self.channel: grpc.aio.Channel | None = None
        self.expected_crashes: set[str] = set()
        """Members whose own crash is part of the test."""
        self._planned: set[int] = set()
        self._nursery: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._born: dict[str, asyncio.Future[int]] = {}
        self._dead: dict[int, asyncio.Event] = {}
        self._points = dict(shape.points)

    async def __aenter__(self) -> Suite:
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in [*self.directory.glob("*.log"), *self.directory.glob("*.census"), *self.directory.glob("faults.txt")]:
            path.unlink()  # an earlier run's, whose lines would be taken for this one's
        preload = ["--preload"] if self.shape.model == FAKE_MODEL else []
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "tests.faults.nursery", *preload]
        self._nursery = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, process_group=0, env=self._nursery_environment
        )
        self._start_task(self._listen())
        for member in self.members.values():
            if member.link is not None:
                await member.link.start()
        for name in self.members:
            await self.start(name)
        self.channel = open_channel(self.members["gateway"].address)
        await self._wait_first_ready()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.channel is not None:
            await self.channel.close()
        for member in self.members.values():
            if member.link is not None:
                await member.link.close()
        if self._nursery is not None and self._nursery.stdin is not None:
            for member in self.members.values():
                if member.pid is not None:
                    self._signal(member.name, signal.SIGKILL)  # also the stopped ones end so
            self._nursery.stdin.close()
            await self._nursery.wait()
            transport = getattr(self._nursery, "_transport", None)
            if transport is not None:
                transport.close()

    @property
    def address(self) -> str:
        return self.members["gateway"].address

    def of_kind(self, kind: str) -> list[Member]:
        return [member for member in self.members.values() if member.kind == kind]

    def process(self, name: str) -> psutil.Process:
        pid = self.members[name].pid
        assert pid is not None, f"{name} does not run"
        return psutil.Process(pid)

    async def start(self, name: str) -> None:
        """Starts a member's process; it serves a moment later."""
        member = self.members[name]
        order = {
            "name": name,
            "role": ROLES[member.kind],
            "argv": self._argv(member),
            "env": self._environment(name),
            "log": str(self.directory / f"{name}.log"),
            "namespace": None if self.network is None else self.network.namespace(name),
        }
        born = self._born[name] = asyncio.get_running_loop().create_future()
        assert self._nursery is not None and self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        member.pid = await born
        member.wanted = True
        member.births += 1
        self._dead[member.pid] = asyncio.Event()

    def kill(self, name: str) -> None:
        self._planned.add(self._signal(name, signal.SIGKILL))

    def freeze(self, name: str) -> None:
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    async def drain(self, name: str, limit_s: float = 30.0) -> int:
        """SIGTERM; its exit status. It is started again if the suite restarts its members."""
        pid = self._signal(name, signal.SIGTERM)
        self._planned.add(pid)
        async with asyncio.timeout(limit_s):
            await self._dead[pid].wait()
        return next(death.status for death in self.deaths if death.pid == pid)

    def arm(self, name: str, points: str) -> None:
        """What failpoints the member's processes have from the next on."""
        self._points[name] = points

    async def restart_armed(self, points: str, *names: str) -> None:
        """Drains idle members; their next processes, ready to serve, have failpoints, and the ones after these have none."""
        births = {name: self.members[name].births for name in names}
        for name in names:
            self.arm(name, points)
        await asyncio.gather(*(self.drain(name) for name in names))
        for name in names:
            await self.wait_born(name, births[name])
            self.arm(name, "")
        await self.wait_ready()

    async def wait_born(self, name: str, births: int, limit_s: float = START_LIMIT_S) -> None:
        """The member has been started more than `births` times."""
        async with asyncio.timeout(limit_s):
            while self.members[name].births <= births:  # noqa: ASYNC110 - the nursery's word
                await asyncio.sleep(0.01)

    async def wait_dead(self, pid: int, limit_s: float = 30.0) -> None:
        async with asyncio.timeout(limit_s):
            await self._dead[pid].wait()

    async def view(self) -> operations_pb2.GetSuiteResponse:
        """The gateway's view of itself and the workers."""
        assert self.channel is not None
        stub = operations_pb2_grpc.OperationsServiceStub(self.channel)  # type: ignore[no-untyped-call]
        view: operations_pb2.GetSuiteResponse = await stub.GetSuite(operations_pb2.GetSuiteRequest(), timeout=5)
        return view

    async def wait_view(
        self, holds: Callable[[operations_pb2.GetSuiteResponse], bool], limit_s: float, why: str
    ) -> operations_pb2.GetSuiteResponse:
        """The first view for which it holds. TimeoutError, with the last view, after `limit_s`."""
        deadline, view = time.monotonic() + limit_s, None
        while time.monotonic() < deadline:
            try:
                view = await self.view()
            except grpc.aio.AioRpcError:
                view = None
            if view is not None and holds(view):
                return view
            await asyncio.sleep(0.02)
        raise TimeoutError(f"{why} not within {limit_s} s: {view}")

    async def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        """Every worker is ready in the gateway's eyes."""
        count = self.shape.num_prefill + self.shape.num_decode
        await self.wait_view(lambda view: sum(worker.ready for worker in view.workers) == count, limit_s, "all workers ready")

    async def wait_idle(self, limit_s: float = 10.0) -> None:
        """Nothing runs or waits anywhere, and every block is free."""
        await self.wait_view(is_idle, limit_s, "idle, with every block free")

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def census(self, name: str, limit_s: float = 5.0) -> Mapping[str, Any]:
        """What a process says that it holds: asyncio tasks, and file descriptors by kind."""
        path = self._census_path(name)
        before = path.stat().st_size if path.exists() else 0
        pid = self._signal(name, signal.SIGUSR1)
        async with asyncio.timeout(limit_s):
            while not path.exists() or path.stat().st_size <= before:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.01)
        found: Mapping[str, Any] = json.loads(path.read_text().splitlines()[-1])
        assert found["pid"] == pid
        return found

    async def _wait_first_ready(self) -> None:
        """A process that cannot even start fails the start, with its last words."""
        ready = asyncio.create_task(self.wait_ready())
        try:
            while not ready.done():
                await asyncio.wait([ready], timeout=0.1)
                for death in self.deaths:
                    raise RuntimeError(f"{death.name} ended with {death.status} while it started:\n{self.log(death.name)[-2000:]}")
            ready.result()
        finally:
            ready.cancel()

    def _place(self, name: str, proxied: bool) -> Member:
        if self.network is None:
            port = port_of_its_own()
            return Member(name, "127.0.0.1", port, Link("127.0.0.1", port) if proxied and name != "gateway" else None)
        return Member(name, self.network.add(name), 50051)

    def _census_path(self, name: str) -> Path:
        return self.directory / f"{name}.census"

    def _argv(self, member: Member) -> list[str]:
        model = "random:tiny" if self.shape.model == FAKE_MODEL else self.shape.model
        argv = ["--model", model, "--host", member.host, "--port", str(member.port), "--exit-with-parent"]
        if member.kind == "gateway":
            for kind in ("prefill", "decode"):
                argv += [f"--{kind}-targets", ",".join(each.address for each in self.of_kind(kind))]
        else:
            blocks = ["--kv-blocks", str(self.shape.kv_blocks)] if self.shape.kv_blocks else []
            argv += ["--transports", self.shape.transports, "--kv-host", member.host, *blocks]
        return [*argv, *self.shape.flags.get(member.kind, ()), *self.shape.flags.get(member.name, ())]

    def _environment(self, name: str) -> dict[str, str]:
        kind = self.members[name].kind
        return {
            "FAULTS_MODEL": self.shape.model if self.shape.model == FAKE_MODEL else "",
            "FAULTS_STEP_MS": str(self.shape.step_ms),
            "FAULTS_TOKEN_US": str(self.shape.token_us if kind == "prefill" else 0),
            "FAULTS_POINTS": self._points.get(name, self._points.get(kind, "")),
            "FAULTS_CENSUS": str(self._census_path(name)),
        }

    def _signal(self, name: str, number: signal.Signals) -> int:
        pid = self.members[name].pid
        assert pid is not None, f"{name} does not run"
        os.kill(pid, number)
        return pid

    async def _listen(self) -> None:
        assert self._nursery is not None and self._nursery.stdout is not None
        while line := await self._nursery.stdout.readline():
            message = json.loads(line)
            if "status" in message:
                self._note_death(message["name"], message["pid"], message["status"])
            else:
                self._born[message["name"]].set_result(message["pid"])

    def _note_death(self, name: str, pid: int, status: int) -> None:
        planned = pid in self._planned or name in self.expected_crashes
        self.deaths.append(Death(name, pid, status, time.monotonic(), planned))
        self.members[name].pid = None
        self._dead[pid].set()
        if self.shape.restarts and self.members[name].wanted:
            self._start_task(self._start_again(name))

    async def _start_again(self, name: str) -> None:
        await asyncio.sleep(self.shape.restart_s)
        await self.start(name)

    def _start_task(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def port_of_its_own() -> int:
    """A port that nobody listens on, outside of the range that the system hands out: a member that restarts needs it again."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_idle(view: operations_pb2.GetSuiteResponse) -> bool:
    """No request anywhere, every block free, every worker ready."""
    return not (view.running_requests or view.queued_requests) and all(
        worker.ready and worker.free_blocks == worker.total_blocks and not worker.queued_requests and not worker.running_requests
        for worker in view.workers
    )

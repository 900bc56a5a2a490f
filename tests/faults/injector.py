"""Does harm to a suite under load, one fault at a time, by seed; and sees when the suite noticed and when it was whole again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from tandem.api.v1 import operations_pb2
from tests.faults.oracle import Fault
from tests.faults.suite import Suite

DETECTION_LIMIT_S = 10.0
RECOVERY_LIMIT_S = 60.0
POLL_S = 0.02


class Links(Protocol):
    """Connections between members that can go dead one way; names are those of members."""

    def cut(self, sender: str, receiver: str) -> None: ...

    def heal(self, sender: str, receiver: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """Which faults, by weight, and the seconds that pass between the suite's being whole and the next one."""

    kinds: dict[str, int]
    pause_s: tuple[float, float] = (0.3, 1.5)
    lasting_s: tuple[float, float] = (2.5, 4.0)
    """How long a member stays frozen, or a link dead."""
    most: int | None = None
    """Faults in all; None: as many as fit."""


KINDS = (
    "kill-prefill",
    "kill-decode",
    "freeze-prefill",
    "freeze-decode",
    "drain-prefill",
    "drain-decode",
    "cut-gateway",
    "cut-workers",
)


@dataclass
class Injector:
    """`num_in_flight` says how many requests run just now."""

    suite: Suite
    plan: Plan
    chance: random.Random
    num_in_flight: Callable[[], int]
    links: Links | None = None
    faults: list[Fault] = field(default_factory=list)
    on_fault: Callable[[Fault], None] = lambda fault: None

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Until `stopped`, or all faults are done. Every fault has ended when this returns."""
        while not stopped() and (self.plan.most is None or len(self.faults) < self.plan.most):
            await self.suite.wait_ready(RECOVERY_LIMIT_S)
            await asyncio.sleep(self.chance.uniform(*self.plan.pause_s))
            await self._wait_load(stopped)
            if stopped():
                return
            kind = self.chance.choices(list(self.plan.kinds), list(self.plan.kinds.values()))[0]
            await self._do(kind)

    async def _wait_load(self, stopped: Callable[[], bool]) -> None:
        """A fault that meets no request proves nothing."""
        while not self.num_in_flight() and not stopped():  # noqa: ASYNC110 - load comes by the trace's clock
            await asyncio.sleep(POLL_S)

    async def _do(self, kind: str) -> None:
        what, _, whom = kind.partition("-")
        in_flight, moment = self.num_in_flight(), time.monotonic()
        match what:
            case "kill":
                name = self._pick(whom)
                detected = await self._kill(name)
            case "drain":
                name = self._pick(whom)
                detected = await self._drain(name)
            case "freeze":
                name = self._pick(whom)
                detected = await self._freeze(name)
            case _:
                name, detected = await self._cut(whom)
        await self.suite.wait_ready(RECOVERY_LIMIT_S)
        fault = Fault(kind, name, moment, in_flight, detected, time.monotonic() - moment)
        self.faults.append(fault)
        self.on_fault(fault)

    def _pick(self, role: str) -> str:
        return self.chance.choice(self.suite.of_kind(role)).name

    async def _kill(self, name: str) -> float | None:
        detecting = self._detection(name)
        self.suite.kill(name)
        return await detecting

    async def _drain(self, name: str) -> float | None:
        detecting = self._detection(name)
        status = await self.suite.drain(name)
        if status != 0:
            raise AssertionError(f"{name} ended its drain with status {status}")
        return await detecting

    async def _freeze(self, name: str) -> float | None:
        detecting = self._detection(name)
        self.suite.freeze(name)
        try:
            await asyncio.sleep(self.chance.uniform(*self.plan.lasting_s))
        finally:
            self.suite.thaw(name)
        return await detecting

    async def _cut(self, what: str) -> tuple[str, float | None]:
        """One or both ways between the gateway and a worker, or between a decode and a prefill worker."""
        assert self.links is not None, "the plan cuts links, and there are none"
        prefill, decode = self._pick("prefill"), self._pick("decode")
        pair = ("gateway", self.chance.choice((prefill, decode))) if what == "gateway" else (decode, prefill)
        ways = self.chance.choice(((pair,), (pair[::-1],), (pair, pair[::-1])))
        detecting = self._detection(pair[1]) if what == "gateway" else None
        with contextlib.ExitStack() as healing:
            for way in ways:
                self.links.cut(*way)
                healing.callback(self.links.heal, *way)
            await asyncio.sleep(self.chance.uniform(*self.plan.lasting_s))
        arrow = "<->" if len(ways) == 2 else "->"
        return arrow.join(ways[0]), None if detecting is None else await detecting

    def _detection(self, name: str) -> asyncio.Task[float | None]:
        """Seconds from now until the gateway no longer takes the member for ready, or takes it for another process."""
        return asyncio.create_task(watch_loss(self.suite, self.suite.members[name].address, time.monotonic()))


async def watch_loss(suite: Suite, address: str, began: float) -> float | None:
    """None if the loss did not show within the limit."""
    known: str | None = None
    while time.monotonic() < began + DETECTION_LIMIT_S:
        with contextlib.suppress(grpc.aio.AioRpcError):
            worker = _worker(await suite.view(), address)
            known = known or worker.worker_id
            if not worker.ready or worker.worker_id != known:
                return time.monotonic() - began
        await asyncio.sleep(POLL_S)
    return None


def _worker(view: operations_pb2.GetSuiteResponse, address: str) -> operations_pb2.WorkerSummary:
    return next(worker for worker in view.workers if worker.address == address)


def plan_of(kinds: Sequence[str], most: int | None = None) -> Plan:
    """Kinds by full name, or by their first word: "kill" is both kill-prefill and kill-decode."""
    chosen = [kind for kind in KINDS if kind in kinds or kind.partition("-")[0] in kinds]
    if not chosen:
        raise ValueError(f"no kinds of fault in {kinds}; there are {', '.join(KINDS)}")
    return Plan(dict.fromkeys(chosen, 1), most=most)

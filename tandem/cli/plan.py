"""Which processes a suite on one machine consists of, and how they are started."""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass, field

from tandem.addresses import target
from tandem.cli.placement import Placement, Seat
from tandem.supervisor import ChildSpec

LOOPBACK = "127.0.0.1"
_WILDCARDS = ("0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class SuitePlan:
    """What `tandem up` was told to start; None leaves a setting to its TANDEM_ variable and its default."""

    model: str
    placement: Placement = field(default_factory=lambda: Placement((Seat(),), (Seat(),)))
    host: str = LOOPBACK
    port: int = 50051
    dtype: str | None = None
    kv_dtype: str | None = None
    prefill_weights: str | None = None
    decode_weights: str | None = None
    threads: int | None = None

    @property
    def address(self) -> str:
        """Where this machine reaches the gateway."""
        return target(LOOPBACK if self.host in _WILDCARDS else self.host, self.port)


@dataclass(frozen=True)
class Member:
    """A process of the suite: how to start it, where it listens, and the service whose health says that it serves."""

    spec: ChildSpec
    address: str
    service: str


def plan_members(plan: SuitePlan) -> list[Member]:
    """The gateway first, then the workers, on free ports that they keep when they are started again."""
    placement = plan.placement
    ports = iter(_free_ports(len(placement.prefill) + len(placement.decode)))
    prefill = [_worker(plan, f"prefill-{number}", seat, next(ports)) for number, seat in enumerate(placement.prefill)]
    decode = [_worker(plan, f"decode-{number}", seat, next(ports)) for number, seat in enumerate(placement.decode)]
    return [_gateway(plan, _targets(prefill), _targets(decode)), *prefill, *decode]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different since all are held at once."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _targets(members: list[Member]) -> str:
    return ",".join(member.address for member in members)


def _gateway(plan: SuitePlan, prefill_targets: str, decode_targets: str) -> Member:
    flags = ("--model", plan.model, "--host", plan.host, "--port", str(plan.port))
    targets = ("--prefill-targets", prefill_targets, "--decode-targets", decode_targets)
    command = (sys.executable, "-m", "gateway", *flags, *targets, "--exit-with-parent")
    return Member(ChildSpec("gateway", command, stop_order=0), plan.address, "tandem.api.v1.GenerationService")


def _worker(plan: SuitePlan, name: str, seat: Seat, port: int) -> Member:
    """Decode workers stop before prefill workers, since they pull from them."""
    role = name.partition("-")[0]
    optional = {
        "--device": seat.device,
        "--gpu-memory-fraction": seat.memory_fraction,
        "--dtype": plan.dtype,
        "--kv-dtype": plan.kv_dtype,
        "--weights": plan.prefill_weights if role == "prefill" else plan.decode_weights,
        "--threads": plan.threads,
    }
    flags = [part for flag, value in optional.items() if value is not None for part in (flag, str(value))]
    where = ("--model", plan.model, "--host", LOOPBACK, "--port", str(port))
    command = (sys.executable, "-m", f"{role}_svc", *where, *flags, "--exit-with-parent")
    spec = ChildSpec(name, command, stop_order=1 if role == "decode" else 2)
    return Member(spec, f"{LOOPBACK}:{port}", f"tandem.worker.v1.{role.capitalize()}Service")

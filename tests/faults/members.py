"""What a suite under test consists of: its shape, its members and what became of their processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem.addresses import target
from tests.faults.proxy import Link

FAKE_MODEL = "fake"
ROLES = {"gateway": "gateway", "prefill": "prefill_svc", "decode": "decode_svc"}


@dataclass(frozen=True)
class Shape:
    """What to start. `flags` and `points` (failpoints) go by member, "decode-0", or by kind, "decode"."""

    num_prefill: int = 2
    num_decode: int = 2
    model: str = FAKE_MODEL
    transports: str = "tcp"
    step_ms: float = 12.0
    token_us: float = 50.0
    kv_blocks: int = 2048
    restarts: bool = True
    restart_s: float = 0.5
    """From a process's death until its successor is started."""
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    points: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        workers = [("prefill", self.num_prefill), ("decode", self.num_decode)]
        return ["gateway", *(f"{kind}-{number}" for kind, count in workers for number in range(count))]


@dataclass
class Member:
    """One place in the suite, and the process that fills it now."""

    name: str
    host: str
    port: int
    link: Link | None = None
    """What the gateway reaches it through, if not directly."""
    pid: int | None = None
    wanted: bool = True
    births: int = 0

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def address(self) -> str:
        """Where it is reached."""
        return target(self.host, self.port if self.link is None else self.link.port)


class ProxyLinks:
    """Connections that go dead one way at a time, where there are no namespaces: those between the gateway and workers only."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = members

    def cut(self, sender: str, receiver: str) -> None:
        self._link(sender, receiver).hold("forth" if sender == "gateway" else "back")

    def heal(self, sender: str, receiver: str) -> None:
        self._link(sender, receiver).let("forth" if sender == "gateway" else "back")

    def _link(self, sender: str, receiver: str) -> Link:
        link = self._members[receiver if sender == "gateway" else sender].link
        assert link is not None and "gateway" in (sender, receiver), "only links of the gateway go through a proxy"
        return link


@dataclass(frozen=True)
class Death:
    """A process's end. `planned`: we killed it, or told it to stop and it ended with 0."""

    name: str
    pid: int
    status: int
    moment: float
    planned: bool

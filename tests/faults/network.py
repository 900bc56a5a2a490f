"""Network namespaces: each process of the suite on a host of its own, and links that go dead one way at a time.

Needs root and the `ip` program. A dead way is a neighbour entry that leads nowhere: packets leave and nobody answers, as with a
broken switch, and neither end is told. `ip` makes no difference between TCP connections that exist and those to come.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NOWHERE = "02:00:00:00:00:fe"


@dataclass
class Network:
    """One bridge, and a namespace for each host. `hosts` maps names to addresses; the load driver is the bridge itself."""

    prefix: str
    subnet: str
    hosts: dict[str, str] = field(default_factory=dict)

    @property
    def gateway_side(self) -> str:
        """The address of the bridge."""
        return f"{self.subnet}.1"

    def namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def add(self, name: str) -> str:
        """A new host; returns its address."""
        number, space = len(self.hosts) + 11, self.namespace(name)
        outer = f"{self.prefix}v{number}"
        address = self.hosts[name] = f"{self.subnet}.{number}"
        _ip("netns", "add", space)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outer, "master", self.prefix, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        return address

    def cut(self, sender: str, receiver: str) -> None:
        """Nothing more gets from one host to another; the other way stays."""
        _ip("-n", self.namespace(sender), *_neighbour("replace", self.hosts[receiver]), "lladdr", NOWHERE, "nud", "permanent")

    def heal(self, sender: str, receiver: str) -> None:
        _ip("-n", self.namespace(sender), *_neighbour("del", self.hosts[receiver]))

    def slow(self, name: str, rate: str) -> None:
        """What leaves the host passes a token bucket, `rate` as tc takes it: "1mbit"."""
        _tc(self.namespace(name), "add", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms")

    def unslow(self, name: str) -> None:
        _tc(self.namespace(name), "del")

    def remove(self) -> None:
        for name in self.hosts:
            _ip("netns", "del", self.namespace(name), check=False)
        _ip("link", "del", self.prefix, check=False)


def available() -> bool:
    """Whether this machine lets us make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"tf{os.getpid()}"
    made = _ip("netns", "add", name, check=False) and _ip("link", "add", name, "type", "bridge", check=False)
    _ip("link", "del", name, check=False)
    _ip("netns", "del", name, check=False)
    return made


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A bridge without hosts; removed with all of its hosts at the end."""
    number = os.getpid() % 250
    it = Network(f"tf{os.getpid() % 100_000}", f"10.{77 + os.getpid() // 250 % 100}.{number}")
    _ip("link", "add", it.prefix, "type", "bridge")
    try:
        _ip("link", "set", it.prefix, "up")
        _ip("addr", "add", f"{it.gateway_side}/24", "dev", it.prefix)
        yield it
    finally:
        it.remove()


def _neighbour(action: str, address: str) -> Sequence[str]:
    return ("neigh", action, address, "dev", "eth0")


def _tc(namespace: str, action: str, *rest: str) -> None:
    subprocess.run(["tc", "-n", namespace, "qdisc", action, "dev", "eth0", "root", *rest], check=True, capture_output=True)


def _ip(*arguments: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True).returncode == 0

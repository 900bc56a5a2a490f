"""The network between simulated processes: what is sent arrives in order, late, after a partition has healed, or never."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.simulation.loop import SimulatedLoop
from tests.simulation.process import Process

Direction = tuple[str, str]
"""From the process of one name to that of another; a restarted process keeps its name."""


@dataclass(frozen=True)
class Latency:
    """Seconds: what most messages take at least and at most, and a share of them that take up to `slow_s`."""

    least_s: float = 20e-6
    most_s: float = 400e-6
    slow_share: float = 0.02
    slow_s: float = 0.02


class Network:
    """Who can reach whom, and where somebody listens."""

    def __init__(self, loop: SimulatedLoop, latency: Latency = Latency()) -> None:
        self.loop = loop
        self._draw = loop.random.random
        self._usual, self._slow = (latency.least_s, latency.most_s), (latency.most_s, latency.slow_s)
        self._slow_share = latency.slow_share
        self.listeners: dict[str, Any] = {}
        """By "host:port": a server of either kind, with the `process` that it belongs to."""
        self.links: list[Any] = []
        """Live connections: they are told when a process dies or a direction is cut."""
        self._cut: dict[Direction, float] = {}
        self._pipes: dict[Direction, list[Pipe]] = {}

    def is_cut(self, source: Process, target: Process) -> bool:
        return (source.name, target.name) in self._cut

    def cut(self, *directions: Direction) -> None:
        """Nothing gets through that way any more; senders do not notice."""
        for direction in directions:
            self._cut.setdefault(direction, self.loop.time())
        self.impaired()

    def heal(self, *directions: Direction) -> None:
        """What was sent meanwhile is sent again, a little later, where the connection still stands."""
        for direction in directions:
            if self._cut.pop(direction, None) is not None:
                for pipe in self._pipes.pop(direction, []):
                    pipe.flush(self.loop.random.uniform(0.0, 0.3))
        self.impaired()

    def heal_all(self) -> None:
        self.heal(*list(self._cut))

    def hold(self, pipe: "Pipe") -> None:
        self._pipes.setdefault((pipe.source.name, pipe.target.name), []).append(pipe)

    def reachable_both_ways(self, one: Process, other: Process) -> bool:
        return not (self.is_cut(one, other) or self.is_cut(other, one))

    def impaired(self) -> None:
        """Connections look at what has become of their way, and begin to count."""
        for link in list(self.links):
            link.look()

    def died(self, process: Process) -> None:
        """Its kernel closes what it had open."""
        for address in [address for address, listener in self.listeners.items() if listener.process is process]:
            del self.listeners[address]
        for link in list(self.links):
            link.died(process)

    def delay(self) -> float:
        random = self._draw
        least_s, most_s = self._slow if random() < self._slow_share else self._usual
        return least_s + (most_s - least_s) * random()


class Pipe:
    """One direction of one connection: first in, first out."""

    def __init__(self, network: Network, source: Process, target: Process) -> None:
        self._network = network
        self.source = source
        self.target = target
        self._last = 0.0
        self._held: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def send(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Has `callback` called in the target's process, if both live that long."""
        if not self.source.alive:
            return
        network = self._network
        if self._held or (network._cut and network.is_cut(self.source, self.target)):
            if not self._held:
                network.hold(self)
            self._held.append((callback, arguments))
            return
        loop = network.loop
        when, earliest = loop._now + network.delay(), self._last + 1e-7
        self._last = when = when if when > earliest else earliest
        loop.deliver(self.target, when, callback, *arguments)

    def flush(self, extra_s: float) -> None:
        held, self._held = self._held, []
        for callback, arguments in held:
            self._deliver(callback, arguments, extra_s)

    def _deliver(self, callback: Callable[..., Any], arguments: Iterable[Any], extra_s: float) -> None:
        network = self._network
        self._last = max(self._last + 1e-7, network.loop.time() + network.delay() + extra_s)
        network.loop.deliver(self.target, self._last, callback, *arguments)


def soon(loop: SimulatedLoop, future: "asyncio.Future[Any]", result: Any = None) -> None:
    """Resolves a future unless somebody was faster."""
    if not future.done():
        future.set_result(result)

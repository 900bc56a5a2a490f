"""What must be true of a suite once everything is over: all has come back (I3), and every counter adds up (I7)."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence

import grpc

from gateway.app import GENERATE
from kvtransfer.counters import ProducerCounters, PullCounters
from tandem.interceptor import OBSERVERS
from tests.simulation.clients import Record
from tests.simulation.node import Node
from tests.simulation.scenario import Fault
from tests.simulation.until import until
from tests.simulation.world import World

QUIESCE_S = 15.0
KEPT_TASKS = {"KvServer._serve", "ServerCall._run"}
"""Idle connections are kept for the next pull; how many, the transport bounds. Calls are looked at by themselves."""


class Afterwards:
    """Made when the suite is ready and has served nobody."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tasks_before = self._tasks()

    async def until_quiet(self) -> None:
        """I3: everything comes back by itself."""
        try:
            async with asyncio.timeout(QUIESCE_S):
                await until(lambda: not self._held())
        except TimeoutError:
            for what in self._held():
                self._world.violated(f"I3: after {QUIESCE_S} s of quiet {what}")
        else:
            self._world.note("quiet")

    def check_counts(self, records: Sequence[Record]) -> None:
        """I7. Of processes that are quiet."""
        world = self._world
        for name, node in world.nodes.items():
            for text in (*_calls_that_do_not_add_up(node), *_tickets_that_do_not_add_up(node)):
                world.violated(f"I7: {name}: {text}")
            for text in _damage_out_of_nothing(node, world):
                world.violated(f"I4: {name}: {text}")
        gateway = world.gateway
        if gateway is not None and not world.deaths["gateway"]:
            counts, served = gateway.server.counts_of(GENERATE), sum(each.code is grpc.StatusCode.OK for each in records)
            if counts.received > len(records) or counts.ok < served:
                world.violated(f"I7: gateway: {counts} after {len(records)} requests, {served} of them served")

    def _held(self) -> list[str]:
        world = self._world
        if not world.all_ready:
            return ["the gateway does not know all workers"]
        held = [
            f"{name} holds {node.allocator.num_blocks - node.allocator.num_free} blocks or tickets"
            for name, node in world.nodes.items()
            if not node.idle and node.allocator is not None
        ]
        calls = [call for call in world.rpc.open_calls if call.task_process.alive]
        requests = Counter(call.path for call in calls if not _observes(call.path))
        held += [f"{count} calls of {path} are open" for path, count in requests.items()]
        kept = Counter((call.task_process.name, call.path) for call in calls)
        held += [f"{count} calls of {path} are open at {name}" for (name, path), count in kept.items() if count > 1]
        gateway = world.gateway
        if gateway is not None and gateway.num_running:
            held.append(f"the gateway runs {gateway.num_running} requests")
        if not held:
            before, now = self._tasks_before, self._tasks()
            held += [
                f"tasks of {name}: {now[name]}, were {before[name]}" for name in sorted(now | before) if now[name] > before[name]
            ]
        return held

    def _tasks(self) -> Counter[str]:
        return Counter(
            f"{node.process.name}/{name}"
            for node in self._world.nodes.values()
            for task in node.process.running_tasks()
            if (name := getattr(task.get_coro(), "__qualname__", "")) not in KEPT_TASKS
        )


def _observes(path: str) -> bool:
    """The gateway's own streams, one to each worker at most."""
    return path.rpartition("/")[2] in OBSERVERS


def _calls_that_do_not_add_up(node: Node) -> Iterator[str]:
    for path, counts in node.server.counts.items():
        ended = counts.ok + counts.cancelled + counts.rejected + counts.failed
        open_now = 1 if _observes(path) else 0
        if not ended <= counts.received <= ended + open_now:
            yield f"{path}: {counts}"


def _tickets_that_do_not_add_up(node: Node) -> Iterator[str]:
    producer = getattr(node.worker, "_producer", None)
    if producer is not None:
        tickets: ProducerCounters = producer.counters()
        if tickets.granted != tickets.released + tickets.expired + tickets.aborted + producer.num_outstanding:
            yield f"{tickets}"


def _damage_out_of_nothing(node: Node, world: World) -> Iterator[str]:
    """Whoever reads a block that is in other use must find out by its generation, and not by its content."""
    puller = getattr(node.worker, "_puller", None)
    if puller is not None and not any(each.fault is Fault.CORRUPT for each in world.scenario.disturbances):
        rows: Sequence[PullCounters] = puller.counters()
        yield from (f"blocks were damaged though nothing damages them: {row}" for row in rows if row.checksum_failures)

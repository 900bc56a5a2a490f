"""`tandem status`: the workers as the gateway sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.api.v1 import operations_pb2
from tandem.cli.client import QUICK_S, Gateway, connect, run_command
from tandem.cli.streaming import TRANSPORTS
from tandem.cli.terminal import output

_REFRESH_S = 1.0
_ROLES = {operations_pb2.WORKER_ROLE_PREFILL: "prefill", operations_pb2.WORKER_ROLE_DECODE: "decode"}
_LOAD = ("worker", "address", "state", "running", "queued", "free blocks", "tok/s")
_MAKE = ("worker", "address", "state", "device", "weights", "transports")
_ENDINGS = ("received", "ok", "cancelled", "rejected", "failed")
_TICKETS = ("granted", "released", "expired", "aborted", "stale", "silenced")
_PULLS = ("pulled", "pulled_blocks", "refetched", "checksum_failures", "stale", "damaged", "resumed", "interrupted")
_PULL_TITLES = tuple(name.replace("_", " ") for name in _PULLS)
_NUMERIC = frozenset({"running", "queued", "free blocks", "tok/s", *_ENDINGS, *_TICKETS, *_PULL_TITLES})
_CONDITIONS = {operations_pb2.WORKER_CONDITION_DRAINING: "draining", operations_pb2.WORKER_CONDITION_STALLED: "stalled"}


def run_status(address: str, watch: bool) -> None:
    run_command(_watch(address) if watch else _show(address))


async def get_suite(gateway: Gateway) -> operations_pb2.GetSuiteResponse:
    response: operations_pb2.GetSuiteResponse = await gateway.operations.GetSuite(operations_pb2.GetSuiteRequest(), timeout=QUICK_S)
    return response


async def _show(address: str) -> None:
    async with connect(address) as gateway:
        output().print(suite_table(address, await get_suite(gateway)))


async def _watch(address: str) -> None:
    async with connect(address) as gateway:
        with Live(suite_table(address, await get_suite(gateway)), console=output(), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(_REFRESH_S)
                live.update(suite_table(address, await get_suite(gateway)), refresh=True)


def suite_table(address: str, suite: operations_pb2.GetSuiteResponse) -> RenderableType:
    """The gateway's numbers, then what each worker does, how its requests ended, and what each is."""
    head = Text.assemble(("gateway", "bold"), f" {address} · {suite.running_requests} running · {suite.queued_requests} queued")
    if not suite.workers:
        return Group(head, Text("The gateway knows of no workers.", style="yellow"))
    load = _table(_LOAD, [_load_of(worker) for worker in _sorted(suite)])
    endings = _table(("worker", "address", *_ENDINGS), [_endings_of(worker) for worker in _sorted(suite)])
    return Group(head, "", load, "", endings, "", *_handoffs(suite), workers_table(suite))


def workers_table(suite: operations_pb2.GetSuiteResponse) -> Table:
    """What each worker is: device, weight format, transports."""
    return _table(_MAKE, [_make_of(worker) for worker in _sorted(suite)])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMERIC else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _sorted(suite: operations_pb2.GetSuiteResponse) -> list[operations_pb2.WorkerSummary]:
    return sorted(suite.workers, key=lambda worker: (worker.role, worker.address))


def _name(worker: operations_pb2.WorkerSummary) -> tuple[str, str, Text]:
    return _ROLES.get(worker.role, "unknown"), worker.address, _state(worker)


def _load_of(worker: operations_pb2.WorkerSummary) -> tuple[str | Text, ...]:
    queued = f"{worker.queued_requests} ({worker.queued_tokens} tok)" if worker.queued_tokens else str(worker.queued_requests)
    speed = f"{worker.tokens_per_second:.0f}" if worker.tokens_per_second else "-"
    return (*_name(worker), str(worker.running_requests), queued, f"{worker.free_blocks}/{worker.total_blocks}", speed)


def _endings_of(worker: operations_pb2.WorkerSummary) -> tuple[str | Text, ...]:
    return (*_name(worker)[:2], *_numbers(worker.requests, _ENDINGS))


def _handoffs(suite: operations_pb2.GetSuiteResponse) -> list[RenderableType]:
    """How tickets ended, and what was pulled from whom; nothing before the first hand-off."""
    workers = _sorted(suite)
    tickets = [(worker.address, worker.handoff.tickets) for worker in workers if worker.handoff.tickets.granted]
    pulls = [(worker.address, pull) for worker in workers for pull in worker.handoff.pulls]
    addresses = {worker.worker_id: worker.address for worker in workers}
    shown: list[RenderableType] = []
    if tickets:
        shown += [_table(("tickets of", *_TICKETS), [(address, *_numbers(counts, _TICKETS)) for address, counts in tickets]), ""]
    if pulls:
        rows = [
            (
                addresses.get(pull.worker_id, "gone"),
                address,
                TRANSPORTS.get(pull.transport, "unknown"),
                *_numbers(pull, _PULLS),
            )
            for address, pull in pulls
        ]
        shown += [_table(("pulls from", "to", "by", *_PULL_TITLES), rows), ""]
    return shown


def _numbers(counts: object, names: Sequence[str]) -> list[str]:
    return [str(getattr(counts, name)) for name in names]


def _make_of(worker: operations_pb2.WorkerSummary) -> tuple[str | Text, ...]:
    return (*_name(worker), worker.device, worker.weight_format, ", ".join(worker.transports))


def _state(worker: operations_pb2.WorkerSummary) -> Text:
    if worker.ready:
        return Text("ready", style="green")
    if not worker.worker_id:
        return Text("unreachable", style="red")
    return Text(_CONDITIONS.get(worker.condition, "not ready"), style="yellow")

"""`tandem status`: the workers as the gateway sees them."""

from __future__ import annotations

import asyncio

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.api.v1 import operations_pb2
from tandem.cli.client import QUICK_S, Gateway, connect, run_command
from tandem.cli.terminal import output

_REFRESH_S = 1.0
_ROLES = {operations_pb2.WORKER_ROLE_PREFILL: "prefill", operations_pb2.WORKER_ROLE_DECODE: "decode"}
_COLUMNS = (
    "worker",
    "address",
    "state",
    "device",
    "weights",
    "running",
    "queued",
    "tokens queued",
    "free blocks",
    "tok/s",
    "transports",
)
_NUMERIC = frozenset({"running", "queued", "tokens queued", "free blocks", "tok/s"})


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
    """The gateway's own numbers above a row per worker."""
    head = Text.assemble(("gateway", "bold"), f" {address} · {suite.running_requests} running · {suite.queued_requests} queued")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMERIC else "left", no_wrap=column in ("address", "device"))
    for worker in sorted(suite.workers, key=lambda worker: (worker.role, worker.address)):
        table.add_row(*_row(worker))
    return Group(head, table if suite.workers else Text("The gateway knows of no workers.", style="yellow"))


def _row(worker: operations_pb2.WorkerSummary) -> tuple[str | Text, ...]:
    return (
        _ROLES.get(worker.role, "unknown"),
        worker.address,
        _state(worker),
        worker.device,
        worker.weight_format,
        str(worker.running_requests),
        str(worker.queued_requests),
        str(worker.queued_tokens),
        f"{worker.free_blocks}/{worker.total_blocks}",
        f"{worker.tokens_per_second:.0f}" if worker.tokens_per_second else "-",
        ", ".join(worker.transports),
    )


def _state(worker: operations_pb2.WorkerSummary) -> Text:
    if worker.ready:
        return Text("ready", style="green")
    return Text("not ready", style="yellow") if worker.worker_id else Text("unreachable", style="red")

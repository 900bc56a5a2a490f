"""`--trace`: the spans of one request, gathered from every process and drawn as a tree."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from tandem.api.v1 import operations_pb2
from tandem.cli.client import QUICK_S, Gateway

# Processes finish their last spans a moment after the client has its answer.
_WAIT_S = 2.0
_POLL_S = 0.1
_LAST_SPANS = frozenset({"decode.run", "kv.pull", "prefill.run"})
_MAX_BAR_CELLS, _MIN_BAR_CELLS = 40, 10
_DURATION_CELLS = 15
_INDENT_CELLS = 4
_STYLES = ("cyan", "green", "magenta", "yellow", "blue")


@dataclass(frozen=True)
class Trace:
    """A sampled W3C trace context that this command begins."""

    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", f"00-{self.trace_id}-{self.span_id}-01"),)


async def show_trace(gateway: Gateway, trace: Trace, console: Console) -> None:
    spans = await _gather(gateway, trace.trace_id)
    if not spans:
        console.print(f"No process remembers spans of the trace {trace.trace_id}.", style="yellow")
        return
    console.print(span_tree(trace.trace_id, spans, console.width))


async def _gather(gateway: Gateway, trace_id: str) -> Sequence[operations_pb2.Span]:
    """The spans; asks again for a moment until the workers' last ones are there."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        spans = await _ask(gateway, trace_id)
        if {span.name for span in spans} >= _LAST_SPANS or time.monotonic() > deadline:
            return spans
        await asyncio.sleep(_POLL_S)


async def _ask(gateway: Gateway, trace_id: str) -> Sequence[operations_pb2.Span]:
    try:
        response = await gateway.operations.GetTrace(operations_pb2.GetTraceRequest(trace_id=trace_id), timeout=QUICK_S)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return ()
        raise
    return list(response.spans)


def span_tree(trace_id: str, spans: Sequence[operations_pb2.Span], width: int) -> Tree:
    """Spans under their parents, each with its duration and a bar that shows when it ran; lines have `width` cells."""
    known = {span.span_id for span in spans}
    children: dict[str, list[operations_pb2.Span]] = defaultdict(list)
    for span in sorted(spans, key=_start_ns):
        children[span.parent_span_id if span.parent_span_id in known else ""].append(span)
    chart = _Chart(spans, children, width)
    tree = Tree(Text(f"trace {trace_id} · {chart.total_ns / 1e6:.1f} ms", style="bold"), guide_style="dim")
    chart.add(tree, "", 0)
    return tree


class _Chart:
    """Where each span's bar begins and ends; services in colours."""

    def __init__(
        self, spans: Sequence[operations_pb2.Span], children: Mapping[str, Sequence[operations_pb2.Span]], width: int
    ) -> None:
        self._children = children
        self._begin_ns = min(map(_start_ns, spans))
        self.total_ns = max(max(map(_end_ns, spans)) - self._begin_ns, 1)
        services = sorted({span.service for span in spans})
        self._styles = {service: _STYLES[number % len(_STYLES)] for number, service in enumerate(services)}
        self._name_cells = self._widest("", 1)
        self._bar_cells = min(max(width - self._name_cells - _DURATION_CELLS, _MIN_BAR_CELLS), _MAX_BAR_CELLS)

    def _widest(self, parent_id: str, depth: int) -> int:
        """Cells of the longest name below `parent_id`, its indentation included."""
        below = self._children.get(parent_id, ())
        own = (depth * _INDENT_CELLS + len(span.name) + len(span.service) + 1 for span in below)
        return max((*own, *(self._widest(span.span_id, depth + 1) for span in below)), default=0)

    def add(self, tree: Tree, parent_id: str, depth: int) -> None:
        for span in self._children.get(parent_id, ()):
            branch = tree.add(self._label(span, depth))
            self.add(branch, span.span_id, depth + 1)

    def _label(self, span: operations_pb2.Span, depth: int) -> Text:
        style = self._styles[span.service]
        label = Text(span.name, style="bold", no_wrap=True).append(f" {span.service}", style=style)
        label.pad_right(self._name_cells - (depth + 1) * _INDENT_CELLS - label.cell_len)
        label.append(f"{(_end_ns(span) - _start_ns(span)) / 1e6:9.2f} ms  ", style="default not bold")
        return label.append(self._bar(span), style=f"{style} not bold")

    def _bar(self, span: operations_pb2.Span) -> str:
        first, last = (round(self._bar_cells * (ns - self._begin_ns) / self.total_ns) for ns in (_start_ns(span), _end_ns(span)))
        first = min(first, self._bar_cells - 1)
        return " " * first + "━" * max(last - first, 1)


def _start_ns(span: operations_pb2.Span) -> int:
    return int(span.start_time.ToNanoseconds())


def _end_ns(span: operations_pb2.Span) -> int:
    return int(span.end_time.ToNanoseconds())

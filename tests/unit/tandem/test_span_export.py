"""A sink of spans that is slow, dead or refusing costs spans, which are counted, and nothing else."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tandem.span_export import REPORT_INTERVAL_S, BoundedExport

MAX_PENDING = 512  # the library's batches hold as many


class Sink(SpanExporter):
    """Takes nothing until it is opened; then answers with `result`."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.result = result
        self.opened = threading.Event()
        self.num_spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.opened.wait(30)
        self.num_spans += len(spans)
        return self.result


End = Callable[[int], None]


@pytest.fixture
def open_export() -> Iterator[Callable[..., tuple[BoundedExport, End]]]:
    """An export to a sink, and what ends so many spans."""
    providers: list[TracerProvider] = []

    def make(sink: SpanExporter, **options: object) -> tuple[BoundedExport, End]:
        export = BoundedExport(sink, MAX_PENDING, **options)  # type: ignore[arg-type]
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(export)
        providers.append(provider)
        tracer = provider.get_tracer("test")
        return export, lambda count: [tracer.start_span("work").end() for _ in range(count)] and None

    yield make
    for provider in providers:
        provider.shutdown()


def test_a_dead_sink_costs_the_spans_beyond_the_bound(open_export) -> None:
    sink = Sink()
    export, end = open_export(sink)
    end(3000)
    assert export.num_dropped == 3000 - MAX_PENDING
    sink.opened.set()
    export.force_flush()
    assert sink.num_spans == MAX_PENDING
    end(100)
    export.force_flush()
    assert (sink.num_spans, export.num_dropped) == (MAX_PENDING + 100, 3000 - MAX_PENDING)


def test_what_a_sink_refuses_is_counted(open_export) -> None:
    sink = Sink(SpanExportResult.FAILURE)
    sink.opened.set()
    export, end = open_export(sink)
    end(100)
    export.force_flush()
    assert export.num_dropped == 100


def test_drops_are_reported_now_and_then(open_export, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    sink = Sink()
    _, end = open_export(sink, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING):
        end(MAX_PENDING + 50)
        now[0] = REPORT_INTERVAL_S
        end(50)
    assert [record.getMessage() for record in caplog.records] == [
        "the span sink is slow or dead: 1 spans dropped so far",
        "the span sink is slow or dead: 51 spans dropped so far",
    ]
    sink.opened.set()


def test_a_sink_that_accepts_and_never_answers_holds_nobody_up(open_export) -> None:
    """Ending spans must not wait: they would for the exporter's timeout, minutes in all."""
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        exporter = OTLPSpanExporter(f"http://127.0.0.1:{black_hole.getsockname()[1]}", insecure=True, timeout=1)
        export, end = open_export(exporter)
        end(3000)
        assert export.num_dropped == 3000 - MAX_PENDING

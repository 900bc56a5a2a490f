"""Tracing set-up: spans are remembered here for a while, and exported over OTLP if the environment names an endpoint."""

import os
import re
import threading
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, Tracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.util.types import AttributeValue

from tandem.api.v1 import operations_pb2
from tandem.errors import invalid_field

_TRACE_ID = re.compile(r"[0-9a-f]{32}")
REMEMBERED_SPANS = 2000
FLUSH_TIMEOUT_S = 2.0

Attributes = Mapping[str, AttributeValue]


class RememberedSpan(NamedTuple):
    """What is told of a span later. The library's own object takes six times as much memory: 3 KB."""

    trace_id: int
    span_id: int
    parent_span_id: int | None
    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue]


class SpanMemory(SpanProcessor):
    """The last finished spans of this process. Any thread may end spans; any thread may ask."""

    def __init__(self, num_spans: int = REMEMBERED_SPANS) -> None:
        self._spans: deque[RememberedSpan] = deque(maxlen=num_spans)
        self._lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        self.add(_remembered(span))

    def add(self, span: RememberedSpan) -> None:
        with self._lock:
            self._spans.append(span)

    def of_trace(self, trace_id: str) -> list[RememberedSpan]:
        """The remembered spans of a trace, given by its 32 lower-case hexadecimal digits, in the order in which they ended."""
        number = int(trace_id, 16)
        with self._lock:
            return [span for span in self._spans if span.trace_id == number]


_memory = SpanMemory()
_service = ""
_provider: TracerProvider | None = None
_tracer: trace.Tracer = trace.NoOpTracer()
_ids: IdGenerator | None = None
"""Where spans that are recorded after the fact go straight to memory: without a sink."""


def configure_tracing(service: str) -> None:
    """Starts tracing for this process, under the name `service`; called once, before serving. Until then spans are not recorded.

    Exports over OTLP (gRPC) only if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set. The exporter has a
    bounded queue and a thread of its own: a slow or dead sink costs spans, which are counted, never serving.
    """
    global _provider, _tracer, _service, _ids
    # Without shutdown_on_exit: the library's own exit hook waits up to 30 s for a dead sink; `flush_tracing` is bounded.
    _provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False)
    _provider.add_span_processor(_memory)
    if _has_sink(os.environ):
        _provider.add_span_processor(_exporting_processor())
    _tracer = _provider.get_tracer("tandem")
    _service = service
    _ids = _provider.id_generator if isinstance(_tracer, Tracer) and not _has_sink(os.environ) else None


def tracer() -> trace.Tracer:
    """The process's tracer; one that records nothing before `configure_tracing`."""
    return _tracer


def record_span(name: str, parent: Context | None, start_ns: int, end_ns: int, attributes: Attributes | None = None) -> None:
    """Records a span after the fact, from any thread. Times are wall-clock nanoseconds, as time.time_ns gives them.

    Without a `parent` it belongs to the current span, or outside of one begins a trace. What nobody exports does not pass through
    the library, which takes ten times as long, on the event loop.
    """
    if _ids is None:
        _tracer.start_span(name, context=parent, start_time=start_ns, attributes=attributes).end(end_time=end_ns)
        return
    above = trace.get_current_span(parent).get_span_context()
    if above.is_valid and not above.trace_flags.sampled:
        return
    trace_id, parent_id = (above.trace_id, above.span_id) if above.is_valid else (_ids.generate_trace_id(), None)
    span_id, known = _ids.generate_span_id(), dict(attributes or {})
    _memory.add(RememberedSpan(trace_id, span_id, parent_id, name, _service, start_ns, end_ns, known))


def recent_spans(trace_id: str) -> list[operations_pb2.Span]:
    """The finished spans of a trace that this process still remembers. Raises INVALID_REQUEST for what is no trace's id."""
    if not _TRACE_ID.fullmatch(trace_id):
        raise invalid_field("trace_id", "must be 32 lower-case hexadecimal digits")
    return [_to_message(span) for span in _memory.of_trace(trace_id)]


def flush_tracing(timeout_s: float = FLUSH_TIMEOUT_S) -> None:
    """Exports what is queued; gives up after `timeout_s`. Blocks: call it off the event loop."""
    if _provider is None:
        return
    # force_flush ignores its timeout while an export hangs, so it is waited for from outside.
    flusher = threading.Thread(target=_provider.force_flush, name="flush-tracing", daemon=True)
    flusher.start()
    flusher.join(timeout_s)


def _has_sink(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def _exporting_processor() -> SpanProcessor:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    from tandem.span_export import BoundedExport

    return BoundedExport(OTLPSpanExporter())


def _remembered(span: ReadableSpan) -> RememberedSpan:
    assert span.context is not None, "a span that has ended was started"
    return RememberedSpan(
        trace_id=span.context.trace_id,
        span_id=span.context.span_id,
        parent_span_id=span.parent.span_id if span.parent else None,
        name=span.name,
        service=str(span.resource.attributes.get(SERVICE_NAME, "")),
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        attributes=dict(span.attributes or {}),
    )


def _to_message(span: RememberedSpan) -> operations_pb2.Span:
    message = operations_pb2.Span(
        span_id=trace.format_span_id(span.span_id),
        parent_span_id="" if span.parent_span_id is None else trace.format_span_id(span.parent_span_id),
        name=span.name,
        service=span.service,
        attributes=[operations_pb2.SpanAttribute(key=key, value=str(value)) for key, value in span.attributes.items()],
    )
    message.start_time.FromNanoseconds(span.start_ns)
    message.end_time.FromNanoseconds(span.end_ns)
    return message

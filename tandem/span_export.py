"""Finished spans on their way to a sink that may be slow or dead: they cost bounded memory, and serving never waits for them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

MAX_PENDING = 2048
REPORT_INTERVAL_S = 60.0


class BoundedExport(SpanProcessor):
    """Hands spans to the library's batches while fewer than `max_pending` are under way; drops and counts the others.

    Any thread may end spans.
    """

    def __init__(self, exporter: SpanExporter, max_pending: int = MAX_PENDING, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_pending = max_pending
        self._clock = clock
        self._lock = threading.Lock()
        self._num_pending = 0
        self._reported_at = -REPORT_INTERVAL_S
        self.num_dropped = 0
        """Spans that the sink never got: too many were under way, or it did not take them."""
        self._batches = BatchSpanProcessor(_Reporting(exporter, self._exported), max_queue_size=max_pending)

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            room = self._num_pending < self._max_pending
            self._num_pending += room
        if room:
            self._batches.on_end(span)
        else:
            self._drop(1)

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._batches.force_flush(timeout_millis)

    def _exported(self, num_spans: int, taken: bool) -> None:
        with self._lock:
            self._num_pending -= num_spans
        if not taken:
            self._drop(num_spans)

    def _drop(self, num_spans: int) -> None:
        with self._lock:
            self.num_dropped += num_spans
            due = self._clock() - self._reported_at >= REPORT_INTERVAL_S
            self._reported_at = self._clock() if due else self._reported_at
        if due:
            logger.warning("the span sink is slow or dead: %d spans dropped so far", self.num_dropped)


class _Reporting(SpanExporter):
    """Tells how each batch fared."""

    def __init__(self, exporter: SpanExporter, exported: Callable[[int, bool], None]) -> None:
        self._exporter = exporter
        self._exported = exported

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
            return result
        finally:
            self._exported(len(spans), result is SpanExportResult.SUCCESS)

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

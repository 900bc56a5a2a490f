"""Spans: remembered by trace, made after the fact, exported without ever being in the way."""

import subprocess
import sys
import threading

import pytest
from opentelemetry import trace

from tandem import tracing
from tandem.channels import call_metadata
from tandem.tracing import SpanMemory, configure_tracing, flush_tracing, recent_spans, record_span, tracer

START_NS = 1_700_000_000_123_456_789


@pytest.fixture(autouse=True)
def configured() -> None:
    configure_tracing("tandem.test")


def test_spans_of_a_trace_are_remembered_with_everything():
    with tracer().start_as_current_span("root") as root:
        record_span("decode.run", trace.set_span_in_context(root), START_NS, START_NS + 5, {"gen_ai.usage.output_tokens": 7})
    trace_id = trace.format_trace_id(root.get_span_context().trace_id)
    child, parent = recent_spans(trace_id)
    assert (child.name, child.service) == ("decode.run", "tandem.test")
    assert (child.parent_span_id, parent.parent_span_id) == (parent.span_id, "")
    assert (child.start_time.ToNanoseconds(), child.end_time.ToNanoseconds()) == (START_NS, START_NS + 5)
    assert [(each.key, each.value) for each in child.attributes] == [("gen_ai.usage.output_tokens", "7")]


def test_a_span_without_a_parent_begins_a_trace(monkeypatch):
    added = []
    monkeypatch.setattr(tracing._memory, "add", added.append)
    record_span("one", None, START_NS, START_NS)
    record_span("two", None, START_NS, START_NS)
    one, two = added
    assert (one.name, one.parent_span_id, two.parent_span_id) == ("one", None, None)
    assert one.trace_id != two.trace_id and one.span_id != two.span_id


def test_what_the_caller_does_not_trace_is_not_recorded():
    untraced = trace.SpanContext(trace_id=7, span_id=8, is_remote=True, trace_flags=trace.TraceFlags(trace.TraceFlags.DEFAULT))
    parent = trace.set_span_in_context(trace.NonRecordingSpan(untraced))
    record_span("x", parent, START_NS, START_NS)
    tracer().start_span("y", context=parent).end()
    assert recent_spans(f"{7:032x}") == []


def test_spans_are_the_same_with_a_sink(repository, unused_tcp_port):
    program = (
        "import os, sys\n"
        "if sys.argv[1:]: os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = sys.argv[1]\n"
        "from tandem.tracing import *\n"
        "configure_tracing('x')\n"
        "with tracer().start_as_current_span('root') as root: record_span('child', None, 1, 2, {'a': 1, 'b': ('c', 'd')})\n"
        "context = root.get_span_context()\n"
        "child, _ = recent_spans(f'{context.trace_id:032x}')\n"
        "told = child.parent_span_id == f'{context.span_id:016x}', len(child.span_id), child.name, child.service\n"
        "print(told, child.start_time.nanos, child.end_time.nanos, [(each.key, each.value) for each in child.attributes])\n"
        "flush_tracing(0.1)"
    )
    assert run(program, repository) == run(program, repository, f"http://127.0.0.1:{unused_tcp_port}")


def test_other_traces_are_not_mixed_in():
    with tracer().start_as_current_span("one") as root:
        one = trace.format_trace_id(root.get_span_context().trace_id)
    with tracer().start_as_current_span("two"):
        pass
    assert [span.name for span in recent_spans(one)] == ["one"]
    assert recent_spans("f" * 32) == []


def test_memory_keeps_the_last_spans_only(monkeypatch):
    monkeypatch.setattr(tracing, "_memory", SpanMemory(num_spans=3))
    configure_tracing("tandem.test")
    with tracer().start_as_current_span("root") as root:
        trace_id = trace.format_trace_id(root.get_span_context().trace_id)
        for number in range(5):
            record_span(f"child {number}", None, START_NS, START_NS)
    assert [span.name for span in recent_spans(trace_id)] == ["child 3", "child 4", "root"]


def test_spans_may_end_on_many_threads_at_once():
    root = tracer().start_span("root")
    context = trace.set_span_in_context(root)
    threads = [threading.Thread(target=lambda: [record_span("x", context, 1, 2) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recent_spans(trace.format_trace_id(root.get_span_context().trace_id))) == 400


def test_outside_a_span_there_is_nothing_to_pass_on():
    assert call_metadata() == ()


def test_inside_a_span_the_w3c_context_is_passed_on():
    with tracer().start_as_current_span("root") as root:
        context = root.get_span_context()
        [(key, value)] = call_metadata()
    assert key == "traceparent"
    assert value.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")


def test_before_configuration_nothing_is_recorded_and_nothing_fails(repository):
    program = (
        "from tandem.tracing import *\n"
        "record_span('x', None, 1, 2)\n"
        "with tracer().start_as_current_span('y') as span: print(span.get_span_context().is_valid)\n"
        "flush_tracing()"
    )
    assert run(program, repository) == "False"


def test_a_dead_sink_delays_neither_spans_nor_the_end(repository, unused_tcp_port):
    program = (
        "import os, time\n"
        f"os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:{unused_tcp_port}'\n"
        "from tandem.tracing import *\n"
        "configure_tracing('x')\n"
        "begin = time.monotonic()\n"
        "for _ in range(5000): record_span('x', None, 1, 2)\n"
        "serving = time.monotonic() - begin\n"
        "flush_tracing(0.5)\n"
        "print(serving < 3 and time.monotonic() - begin - serving < 3)"
    )
    assert run(program, repository) == "True"


def test_without_a_sink_the_exporter_is_not_even_loaded(repository):
    program = "import sys\nfrom tandem.tracing import *\nconfigure_tracing('x')\nprint('opentelemetry.exporter' in sys.modules)"
    assert run(program, repository) == "False"


def test_flushing_without_a_sink_returns_at_once():
    flush_tracing()


def run(program: str, repository, *arguments: str) -> str:
    """What a fresh process prints; its whole life is bounded, so a hang at exit fails too."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, text=True, timeout=20, check=True).stdout.strip()

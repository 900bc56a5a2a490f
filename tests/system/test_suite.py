"""What a user and an operator can count on from the real processes."""

import os
import signal
import time
from pathlib import Path

import grpc
import psutil
import pytest

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason, from_rpc_error
from tests.system.conftest import Suite, collect, greedy, start

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

SPANS = {
    "gateway.tokenize",
    "gateway.route",
    "prefill.queue",
    "prefill.run",
    "kv.wait",
    "kv.pull",
    "decode.queue",
    "decode.run",
}


def test_a_trace_has_all_spans_under_one_root(exact_suite: Suite) -> None:
    trace_id, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    metadata = (("traceparent", f"00-{trace_id}-{caller}-01"),)
    collect(exact_suite.generation.Generate(greedy([1, 2, 3], max_tokens=4), metadata=metadata, timeout=60))
    deadline = time.monotonic() + 5
    while True:
        trace = exact_suite.operations.GetTrace(operations_pb2.GetTraceRequest(trace_id=trace_id), timeout=5)
        if {span.name for span in trace.spans} >= SPANS or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert {span.name for span in trace.spans} >= SPANS
    known = {span.span_id for span in trace.spans} | {caller}
    assert all(span.parent_span_id in known for span in trace.spans)
    assert all(span.start_time.ToNanoseconds() <= span.end_time.ToNanoseconds() for span in trace.spans)


def test_timings_add_up_to_the_wall_time(exact_suite: Suite) -> None:
    began = time.perf_counter()
    _, _, finished = collect(exact_suite.generation.Generate(greedy(list(range(100, 700)), max_tokens=24), timeout=60))
    wall_us = 1e6 * (time.perf_counter() - began)
    timings = finished.timings
    phases = (
        timings.tokenize_us,
        timings.gateway_queue_us,
        timings.prefill_queue_us,
        timings.prefill_us,
        timings.handoff_us,
        timings.decode_queue_us,
        timings.decode_us,
    )
    assert min(phases) >= 0
    assert sum(phases) == pytest.approx(wall_us, rel=0.05)
    assert timings.transport == generation_pb2.TRANSPORT_SHM
    assert timings.handoff_bytes > 0


@pytest.mark.parametrize("after_messages", [0, 1, 5])
def test_a_cancel_frees_every_block(exact_suite: Suite, after_messages: int) -> None:
    call = exact_suite.generation.Generate(greedy(list(range(100, 900)), max_tokens=500), timeout=60)
    for _ in range(after_messages):
        next(call)
    call.cancel()
    exact_suite.wait_blocks_free(3.0)


MANY = 10**5


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", Reason.PROMPT_EMPTY),
        ({"token_ids": generation_pb2.TokenIds(ids=[1] * 9000)}, "INVALID_ARGUMENT", Reason.PROMPT_TOO_LONG),
        ({"token_ids": generation_pb2.TokenIds(ids=[49152])}, "INVALID_ARGUMENT", None),
        ({"stopping": generation_pb2.StoppingParams(max_tokens=0)}, "INVALID_ARGUMENT", None),
        ({"stopping": generation_pb2.StoppingParams(max_tokens=-1)}, "INVALID_ARGUMENT", None),
        ({"stopping": generation_pb2.StoppingParams(max_tokens=2**31)}, "INVALID_ARGUMENT", None),
        ({"stopping": generation_pb2.StoppingParams(stop=["x"] * MANY)}, "INVALID_ARGUMENT", None),
        ({"sampling": generation_pb2.SamplingParams(temperature=float("nan"))}, "INVALID_ARGUMENT", None),
        ({"sampling": generation_pb2.SamplingParams(temperature=-0.5)}, "INVALID_ARGUMENT", None),
        ({"sampling": generation_pb2.SamplingParams(top_p=0)}, "INVALID_ARGUMENT", None),
        ({"sampling": generation_pb2.SamplingParams(top_p=1.5)}, "INVALID_ARGUMENT", None),
        ({"model": "nobody"}, "NOT_FOUND", Reason.UNKNOWN_MODEL),
        (
            {"chat": generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role=77, content="x")])},  # type: ignore[arg-type]
            "INVALID_ARGUMENT",
            None,
        ),
        ({"text": "x" * (5 << 20)}, "RESOURCE_EXHAUSTED", None),
    ],
)
def test_bad_input_gets_the_tables_answer(exact_suite: Suite, fields: dict, code: str, reason: Reason | None) -> None:  # type: ignore[type-arg]
    request = generation_pb2.GenerateRequest(
        **({"text": "x"} if not fields.keys() & {"text", "token_ids", "chat"} else {}), **fields
    )
    with pytest.raises(grpc.RpcError) as caught:
        collect(exact_suite.generation.Generate(request, timeout=30))
    assert caught.value.code().name == code
    if reason is not None:
        assert from_rpc_error(caught.value).reason is reason
    tokens, _, _ = collect(exact_suite.generation.Generate(greedy([5, 6, 7], max_tokens=2), timeout=30))
    assert len(tokens) == 2


def test_malformed_bytes_are_the_callers_fault(exact_suite: Suite) -> None:
    call = exact_suite.channel.unary_stream("/tandem.api.v1.GenerationService/Generate")
    for raw in (b"\x12\x02\xff\xfe", b"\x12\xff\xff\xff\xff\x0f", os.urandom(64)):
        with pytest.raises(grpc.RpcError) as caught:
            list(call(raw, timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_gateway_is_small(exact_suite: Suite) -> None:
    (gateway,) = exact_suite.member("gateway")
    assert gateway.memory_info().rss < 150 << 20


def shared_memory_files() -> set[Path]:
    return {path for path in Path("/dev/shm").glob("*") if "tandem" in path.name}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind(number: signal.Signals) -> None:
    before = shared_memory_files()
    suite = start("--model", "random:tiny")
    children = suite.process.children(recursive=True)
    assert len(children) >= 3
    collect(suite.generation.Generate(greedy([5, 6, 7], max_tokens=3), timeout=30))
    suite.channel.close()
    suite.process.send_signal(number)
    suite.process.wait(30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert shared_memory_files() == before


def test_a_killed_worker_is_started_again() -> None:
    suite = start("--model", "random:tiny")
    try:
        (victim,) = suite.member("decode_svc")
        victim.kill()
        victim.wait(10)
        deadline = time.monotonic() + 60
        while True:
            try:
                tokens, _, _ = collect(suite.generation.Generate(greedy([5, 6, 7], max_tokens=3), timeout=10))
                break
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED), error
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert len(tokens) == 3
    finally:
        suite.process.terminate()
        suite.process.wait(30)

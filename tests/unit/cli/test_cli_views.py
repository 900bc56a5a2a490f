"""What commands print, without a server."""

import io
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.cli.client import explain
from tandem.cli.devices import cpu_features
from tandem.cli.pull import DownloadBar
from tandem.cli.requests import SamplingOptions, Turn, make_request
from tandem.cli.streaming import Answer, summary
from tandem.cli.suite_view import StartView, choose_transport
from tandem.cli.terminal import CommandError, write_text
from tandem.cli.trace import Trace, span_tree
from tandem.error_details import trailers
from tandem.errors import FieldViolation, Reason, TandemError, to_status


def page(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def span(name: str, span_id: str, parent: str, start_ms: int, end_ms: int) -> operations_pb2.Span:
    times = {"start_time": Timestamp(nanos=start_ms * 1_000_000), "end_time": Timestamp(nanos=end_ms * 1_000_000)}
    return operations_pb2.Span(name=name, span_id=span_id, parent_span_id=parent, service="s", **times)


def test_trace_metadata_is_a_sampled_w3c_context() -> None:
    trace = Trace()
    ((key, value),) = trace.metadata
    version, trace_id, span_id, sampled = value.split("-")
    assert (key, version, sampled) == ("traceparent", "00", "01")
    assert (trace_id, span_id) == (trace.trace_id, trace.span_id) and (len(trace_id), len(span_id)) == (32, 16)
    assert Trace().trace_id != trace_id


def test_span_tree_nests_sorts_and_scales() -> None:
    spans = [
        span("decode.run", "d", "root", 50, 100),
        span("generate", "root", "unknown", 0, 100),
        span("prefill.run", "p", "root", 0, 50),
        span("step", "x", "p", 10, 10),
    ]
    console = page()
    console.print(span_tree("abc", spans, 120))
    lines = text_of(console).splitlines()
    assert "abc" in lines[0] and "100.0 ms" in lines[0]
    order = ["generate", "prefill.run", "step", "decode.run"]
    assert [next(name for name in order if name in line) for line in lines[1:]] == order
    assert [line.count("━") for line in lines[1:] if "━" in line] == [40, 20, 1, 20]
    starts = {line.index("ms") for line in lines[1:]}
    assert len(starts) == 1, "durations line up"


def test_summary_names_the_hand_off() -> None:
    answer = Answer(started=10.0)
    answer.add(generation_pb2.Delta(index=0, text="a", token_ids=[1]), 10.1)
    answer.add(generation_pb2.Delta(index=1, text="b", token_ids=[2, 3]), 10.2)
    answer.finished = generation_pb2.Finished(
        reason=generation_pb2.FINISH_REASON_LENGTH,
        usage=generation_pb2.Usage(prompt_tokens=9, cached_prompt_tokens=4, completion_tokens=3),
        timings=generation_pb2.Timings(handoff_us=1500, handoff_bytes=2_000_000, transport=generation_pb2.TRANSPORT_SHM),
    )
    line = summary(answer)
    for part in (
        "100 ms",
        "20.0 tok/s",
        "9 prompt tokens (4 cached), 3 generated",
        "hand-off 1.5 ms, 2.0 MB over shm",
        "token limit",
    ):
        assert part in line


def test_gap_in_the_stream_is_an_error() -> None:
    answer = Answer(started=0.0)
    answer.add(generation_pb2.Delta(index=0, token_ids=[1]), 0.1)
    with pytest.raises(CommandError, match="gap"):
        answer.add(generation_pb2.Delta(index=2, token_ids=[1]), 0.2)


def test_unset_sampling_options_stay_unset() -> None:
    request = make_request("hi", SamplingOptions(5, 0.0))
    assert request.text == "hi" and request.sampling.HasField("temperature") and not request.sampling.HasField("top_p")
    assert not request.output.HasField("logprobs")
    chat = make_request([Turn("system", "s"), Turn("user", "u")], SamplingOptions(5, 0.5, seed=7, stop=("x",)), logprobs=0)
    assert [message.content for message in chat.chat.messages] == ["s", "u"]
    assert chat.output.HasField("logprobs") and list(chat.stopping.stop) == ["x"] and chat.sampling.seed == 7


def rpc_error(error: TandemError) -> grpc.aio.AioRpcError:
    status = to_status(error)
    metadata = grpc.aio.Metadata(*trailers(status))
    return grpc.aio.AioRpcError(error.code, grpc.aio.Metadata(), metadata, details=status.message)


@pytest.mark.parametrize("reason", Reason)
def test_every_error_has_its_reason_in_the_message(reason: Reason) -> None:
    shown = explain(rpc_error(TandemError(reason, "what happened")), "host:1")
    assert "what happened" in str(shown) and f"[{reason}]" in str(shown)


def test_violations_and_delays_are_shown() -> None:
    violations = (FieldViolation("sampling.top_p", "must be in (0, 1]"),)
    assert "sampling.top_p: must be" in str(
        explain(rpc_error(TandemError(Reason.INVALID_SAMPLING, "bad", violations=violations)), "h:1")
    )
    assert "Try again" in explain(rpc_error(TandemError(Reason.NO_WORKER, "none", retry_after_s=3)), "h:1").advice


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ("failed to connect to all addresses", "tandem up"),
        ("errors resolving foo: no such name", "--address"),
        ("Socket closed", "running"),
    ],
)
def test_missing_gateway_is_told_from_a_lost_one(details: str, said: str) -> None:
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    shown = explain(error, "host:1")
    assert "host:1" in str(shown) and said in shown.advice


@pytest.mark.parametrize(
    ("prefill", "decode", "name"),
    [
        ([["shm", "tcp"]], [["shm", "tcp"]], "shm"),
        ([["shm", "tcp"], ["shm", "tcp"]], [["tcp"]], "tcp"),
        ([["tcp"]], [["shm"]], "none"),
        ([], [], "none"),
    ],
)
def test_transport_is_the_best_that_all_have(prefill: list[list[str]], decode: list[list[str]], name: str) -> None:
    chosen, reason = choose_transport(prefill, decode)
    assert chosen == name and reason


def test_text_cannot_steer_a_terminal_and_is_exact_in_a_file() -> None:
    screen, file = page(terminal=True), page()
    for console in (screen, file):
        write_text(console, "a\x1b[2Jb\r\n\tc" + "é" * 200)
    assert text_of(screen) == "a[2Jb\n\tc" + "é" * 200
    assert text_of(file) == "a\x1b[2Jb\r\n\tc" + "é" * 200


def test_download_is_one_line_per_stage_in_a_log() -> None:
    console = page()
    with DownloadBar(console) as bar:
        bar("downloading x", 0, 100)
        bar("downloading x", 50, 100)
        bar("verifying x", 100, 100)
    assert text_of(console) == "downloading x …\nverifying x …\n"


def test_download_is_a_bar_on_a_terminal() -> None:
    console = page(terminal=True)
    with DownloadBar(console) as bar:
        bar("waiting for another process", 0, None)
        bar("downloading x", 50, 100)
        bar("downloading x", 100, 100)
    assert "waiting for another process" in text_of(console) and "downloading x" in text_of(console)


def test_loading_is_read_from_log_lines() -> None:
    console = page()
    with StartView(console, ["prefill-0"], verbose=False) as view:
        view.started("prefill-0")
        view.line("prefill-0", "12:00:00 INFO prefill: loading  40 %: reading weights")
        view.line("prefill-0", "12:00:00 INFO prefill: something else")
        view.serving("prefill-0")
        view.died("prefill-0", -9, 0.5)
    assert text_of(console).splitlines() == [
        "prefill-0: reading weights",
        "prefill-0: serving",
        "prefill-0 was killed by SIGKILL; starting it again in 0.5 s",
    ]


def test_verbose_shows_every_line_with_its_process() -> None:
    console = page()
    with StartView(console, ["gateway"], verbose=True) as view:
        view.line("gateway", "hello [red]x[/]")
    assert text_of(console) == "   gateway │ hello [red]x[/]\n"


def test_starting_table_shows_each_process() -> None:
    console = page(terminal=True)
    view = StartView(console, ["gateway", "decode-0"], verbose=False)
    view.line("decode-0", "loading  40 %: reading weights")
    console.print(view)
    assert "gateway" in text_of(console) and "reading weights" in text_of(console)


def test_cpu_features_of_both_makes(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu avx2 fma nonsense\n")
    (tmp_path / "arm").write_text("Features\t: fp asimd asimddp\n")
    assert cpu_features(tmp_path / "x86") == ["avx2", "fma"]
    assert cpu_features(tmp_path / "arm") == ["asimd", "asimddp"]
    assert cpu_features(tmp_path / "none") == []

"""`tandem generate`, `tandem chat` and `tandem status` against a fake gateway over real gRPC."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.errors import Reason
from tests.service.cli.conftest import Cli
from tests.service.cli.fake_gateway import FakeGateway, worker


def test_answer_goes_to_stdout_and_summary_to_stderr(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "one two three", "-a", gateway.address)
    assert (result.exit_code, result.stdout) == (0, "three two one\n")
    assert "3 generated" in result.stderr and "hand-off 2.5 ms, 1.5 MB over shm" in result.stderr


def test_chat_is_chosen_by_the_model_and_by_flag(cli: Cli, gateway: FakeGateway) -> None:
    cli("generate", "hi", "-a", gateway.address, "--system", "Be brief.")
    cli("generate", "hi", "-a", gateway.address, "--raw")
    gateway.models.chat_capable = False
    cli("generate", "hi", "-a", gateway.address)
    chat, raw, other = gateway.generation.requests
    roles = [generation_pb2.CHAT_ROLE_SYSTEM, generation_pb2.CHAT_ROLE_USER]
    assert [message.role for message in chat.chat.messages] == roles
    assert raw.WhichOneof("input") == other.WhichOneof("input") == "text"


def test_options_reach_the_request(cli: Cli, gateway: FakeGateway) -> None:
    options = ["-n", "7", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "11", "--stop", "a", "--stop", "b"]
    assert cli("generate", "hi", "-a", gateway.address, *options).exit_code == 0
    (request,) = gateway.generation.requests
    assert request.sampling == generation_pb2.SamplingParams(temperature=0.5, top_p=0.9, top_k=3, seed=11)
    assert request.stopping == generation_pb2.StoppingParams(max_tokens=7, stop=["a", "b"])


def test_greedy_is_the_default(cli: Cli, gateway: FakeGateway) -> None:
    cli("generate", "hi", "-a", gateway.address)
    assert gateway.generation.requests[0].sampling == generation_pb2.SamplingParams(temperature=0)


def test_prompt_from_standard_input(cli: Cli, gateway: FakeGateway) -> None:
    assert cli("generate", "-", "--raw", "-a", gateway.address, typed="from a pipe").stdout == "pipe a from\n"


@pytest.mark.parametrize(
    "options",
    [
        *(("--seed", "-1"), ("--seed", str(2**64)), ("--top-k", str(2**31)), ("--top-k", "-1")),
        *(("-n", "0"), ("-n", str(10**20)), ("--logprobs", "21")),
    ],
)
def test_numbers_that_no_request_can_hold_are_refused_by_name(cli: Cli, gateway: FakeGateway, options: tuple[str, str]) -> None:
    result = cli("generate", "hi", "-a", gateway.address, *options)
    assert result.exit_code == 2 and options[0] in result.stderr


def test_the_largest_numbers_are_taken(cli: Cli, gateway: FakeGateway) -> None:
    options = ("--seed", str(2**64 - 1), "--top-k", str(2**31 - 1), "-n", str(2**31 - 1), "--logprobs", "20")
    assert cli("generate", "hi", "-a", gateway.address, *options).exit_code == 0


@pytest.mark.parametrize("options", [("caf\udce9",), ("hi", "--system", "\udcff"), ("hi", "--stop", "\udcff")])
def test_arguments_that_are_no_text_are_refused_in_words(cli: Cli, gateway: FakeGateway, options: tuple[str, ...]) -> None:
    result = cli("generate", *options, "-a", gateway.address)
    assert result.exit_code == 1 and result.stderr.startswith("error: The text is not valid UTF-8.")


@pytest.mark.parametrize("command", [("generate", "-"), ("chat",)])
def test_input_that_is_no_text_is_refused_in_words(gateway: FakeGateway, command: tuple[str, ...]) -> None:
    program = [sys.executable, "-m", "tandem.cli", *command, "-a", gateway.address]
    result = subprocess.run(program, input=b"caf\xe9\n", capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False)
    assert b"error: The text is not valid UTF-8." in result.stderr and b"Traceback" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_answer_that_cannot_be_written_is_told_in_a_line(gateway: FakeGateway) -> None:
    program = [sys.executable, "-m", "tandem.cli", "generate", "hi", "-a", gateway.address]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode != 0 and b"No space left" in result.stderr and b"Traceback" not in result.stderr


def test_logprobs_are_a_table(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "hi", "-a", gateway.address, "--logprobs", "1")
    assert "-1.2500" in result.stderr and "'seven' -0.500" in result.stderr


def test_trace_is_sampled_awaited_and_drawn(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "hi", "-a", gateway.address, "--trace")
    (parent,) = gateway.generation.trace_parents
    assert parent.endswith("-01") and parent.split("-")[1] in result.stderr
    assert all(name in result.stderr for name in ("generate", "prefill.run", "kv.pull", "decode.run", "━", "5.00 ms"))
    assert gateway.operations.num_trace_calls == 2


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.PROMPT_TOO_LONG, Reason.INTERNAL])
def test_refusal_is_one_message_and_status_1(cli: Cli, gateway: FakeGateway, reason: Reason) -> None:
    result = cli("generate", f"fail:{reason}", "-a", gateway.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"refused by the fake [{reason}]" in result.stderr and "Traceback" not in result.stderr


def test_failure_after_tokens_keeps_what_came(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "break:STREAM_BROKEN word", "-a", gateway.address)
    assert (result.exit_code, result.stdout) == (1, "word\n") and "[STREAM_BROKEN]" in result.stderr


def test_gap_in_the_stream_is_an_error(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "lose a token", "-a", gateway.address)
    assert result.exit_code == 1 and "gap" in result.stderr


@pytest.mark.parametrize("command", [["generate", "hi"], ["status"], ["chat"]])
def test_no_server_says_how_to_start_one(cli: Cli, command: list[str]) -> None:
    result = cli(*command, "-a", "127.0.0.1:1")
    assert result.exit_code == 1 and "No gateway answers at 127.0.0.1:1" in result.stderr and "tandem up" in result.stderr


def test_system_needs_a_conversation(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("generate", "hi", "--raw", "--system", "x", "-a", gateway.address)
    assert result.exit_code == 1 and "--raw" in result.stderr


def test_chat_remembers_the_conversation(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("chat", "-a", gateway.address, "--system", "Be kind.", typed="hello there\nwhy so\n/exit\n")
    assert result.exit_code == 0 and "there hello" in result.stdout
    contents = [[message.content for message in request.chat.messages] for request in gateway.generation.requests]
    assert contents == [["Be kind.", "hello there"], ["Be kind.", "hello there", "there hello", "why so"]]


def test_chat_commands(cli: Cli, gateway: FakeGateway) -> None:
    typed = "one\n/reset\ntwo\n/system Rhyme.\nthree\n/system\nfour\n/help\n/nonsense\n\n5 \\\nlines\n"
    result = cli("chat", "-a", gateway.address, typed=typed)
    contents = [[message.content for message in request.chat.messages] for request in gateway.generation.requests]
    assert contents == [["one"], ["two"], ["Rhyme.", "three"], ["four"], ["four", "four", "5 \nlines"]]
    assert result.exit_code == 0 and "/reset" in result.stdout and "No command /nonsense" in result.stderr


def test_chat_goes_on_after_an_error(cli: Cli, gateway: FakeGateway) -> None:
    result = cli("chat", "-a", gateway.address, typed="fail:QUEUE_FULL\nagain\n")
    assert result.exit_code == 0 and "[QUEUE_FULL]" in result.stderr
    assert [message.content for message in gateway.generation.requests[1].chat.messages] == ["again"]


def test_chat_needs_a_template(cli: Cli, gateway: FakeGateway) -> None:
    gateway.models.chat_capable = False
    result = cli("chat", "-a", gateway.address, typed="hi\n")
    assert result.exit_code == 1 and "--raw" in result.stderr


@pytest.fixture
def process(gateway: FakeGateway) -> Iterator[subprocess.Popen[str]]:
    """`tandem chat` as a process that can get signals."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tandem.cli", "chat", "-a", gateway.address]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        yield running
        running.kill()


def test_ctrl_c_stops_the_answer_and_not_the_chat(process: subprocess.Popen[str], gateway: FakeGateway) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hang now\n")
    process.stdin.flush()
    assert process.stdout.read(3) == "now"
    process.send_signal(signal.SIGINT)
    assert gateway.generation.cancelled.wait(60), "the call was not cancelled"
    stdout, stderr = process.communicate("more\n", timeout=60)
    assert process.returncode == 0 and "(stopped)" in stderr and "more" in stdout
    assert [message.content for message in gateway.generation.requests[1].chat.messages] == ["hang now", "now", "more"]


def test_ctrl_c_ends_generate_and_cancels_the_call(gateway: FakeGateway) -> None:
    command = [sys.executable, "-m", "tandem.cli", "generate", "hang", "-a", gateway.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert gateway.generation.hung.wait(60)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert gateway.generation.cancelled.wait(60)


def test_status_is_a_row_per_worker(cli: Cli, gateway: FakeGateway) -> None:
    gateway.operations.workers += [
        worker(operations_pb2.WORKER_ROLE_DECODE, ready=False, queued_tokens=77, tokens_per_second=12.4),
        worker(operations_pb2.WORKER_ROLE_PREFILL, ready=False, worker_id=""),
        worker(
            operations_pb2.WORKER_ROLE_DECODE,
            ready=False,
            condition=operations_pb2.WORKER_CONDITION_STALLED,
            requests=operations_pb2.RequestCounts(received=9_011, ok=8_022, cancelled=7_033, rejected=6_044, failed=5_055),
        ),
    ]
    result = cli("status", "-a", gateway.address)
    assert result.exit_code == 0 and "3 running · 4 queued" in result.stdout
    shown = ("not ready", "unreachable", "stalled", "90/100", "shm, tcp")
    assert [result.stdout.count(state) for state in shown] == [2, 2, 2, 5, 5]
    assert " 12\n" in result.stdout and "0 (77 tok)" in result.stdout
    assert ["9011", "8022", "7033", "6044", "5055"] in [line.split()[2:] for line in result.stdout.splitlines()]


def test_status_tells_of_hand_offs_once_there_are_any(cli: Cli, gateway: FakeGateway) -> None:
    assert "pulls from" not in cli("status", "-a", gateway.address).stdout
    tickets = operations_pb2.TicketCounts(granted=9, released=7, expired=1, aborted=1)
    known = operations_pb2.PullCounts(worker_id="p", transport=generation_pb2.TRANSPORT_CUDA_IPC, pulled=7, pulled_blocks=70)
    gone = operations_pb2.PullCounts(worker_id="?", transport=generation_pb2.TRANSPORT_TCP, checksum_failures=3)
    gateway.operations.workers[:] = [
        worker(operations_pb2.WORKER_ROLE_PREFILL, worker_id="p", handoff=operations_pb2.HandoffCounts(tickets=tickets)),
        worker(operations_pb2.WORKER_ROLE_DECODE, handoff=operations_pb2.HandoffCounts(pulls=[known, gone])),
    ]
    rows = [line.split() for line in cli("status", "-a", gateway.address).stdout.splitlines()]
    address = gateway.operations.workers[0].address
    assert [address, "9", "7", "1", "1", "0", "0"] in rows
    assert [address, address, "cuda_ipc", "7", "70", "0", "0", "0", "0", "0", "0"] in rows
    assert ["gone", address, "tcp", "0", "0", "0", "3", "0", "0", "0", "0"] in rows


def test_status_without_workers_says_so(cli: Cli, gateway: FakeGateway) -> None:
    gateway.operations.workers.clear()
    assert "no workers" in cli("status", "-a", gateway.address).stdout

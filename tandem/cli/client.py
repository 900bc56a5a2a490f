"""Calls to the gateway, and what their failures mean to a person."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import grpc
import grpc.aio

from tandem.api.v1 import generation_pb2_grpc, model_pb2_grpc, operations_pb2_grpc
from tandem.channels import open_channel
from tandem.cli.terminal import CommandError, print_error
from tandem.errors import Reason, TandemError, from_rpc_error
from tandem.models import ModelError

# Seconds that a question about the suite may take.
QUICK_S = 10.0
_INTERRUPTED = 130

_ADVICE = {
    Reason.PROMPT_TOO_LONG: "Shorten the prompt; in a chat, /reset starts anew.",
    Reason.PROMPT_EMPTY: "Give some text.",
    Reason.MESSAGE_TOO_LARGE: "Shorten the prompt.",
    Reason.UNKNOWN_MODEL: "`tandem up --model NAME` chooses the model that a suite serves.",
    Reason.TEMPLATE_FAILED: "The model's chat template refuses this conversation; try --raw.",
    Reason.QUEUE_FULL: "The suite is busy. Try again in a moment.",
    Reason.KV_BLOCKS_EXHAUSTED: "The workers' memory is full. Try again in a moment, or with a shorter prompt.",
    Reason.SLOW_READER: "The answer was not read fast enough; do not pause the terminal.",
    Reason.NO_WORKER: "`tandem status` shows the workers.",
    Reason.WORKER_LOST: "A worker died; a supervised one comes back by itself. Try again in a moment, and see `tandem status`.",
    Reason.LOADING: "The model is still loading. Try again in a moment.",
    Reason.DRAINING: "The suite is shutting down.",
    Reason.STREAM_BROKEN: "The worker that wrote the answer died. Try again.",
    Reason.MODEL_MISMATCH: "The suite's processes hold different models; start all of them with the same --model.",
    Reason.KV_LAYOUT_MISMATCH: "Prefill and decode workers are set up differently; start them with the same settings.",
    Reason.ENGINE_FAILED: "The worker's log has more; a supervised worker is restarted.",
    Reason.INTERNAL: "This is a defect of Tandem; the gateway's log has more.",
}


class Gateway:
    """The gateway's services over one channel."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        self.models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        self.operations = operations_pb2_grpc.OperationsServiceStub(channel)  # type: ignore[no-untyped-call]


@contextlib.asynccontextmanager
async def connect(address: str) -> AsyncIterator[Gateway]:
    """A gateway to call; RPC failures inside the block become CommandErrors."""
    channel = open_channel(address)
    try:
        yield Gateway(channel, address)
    except grpc.aio.AioRpcError as error:
        raise explain(error, address) from error
    finally:
        await channel.close()


def run_command(work: Coroutine[Any, Any, None]) -> None:
    """Run a command's work on an event loop, with `exit_on_error`."""
    with exit_on_error():
        asyncio.run(work)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """What a command cannot do becomes one message and exit status 1; Ctrl-C becomes status 130."""
    try:
        yield
    except CommandError as error:
        print_error(error)
        raise SystemExit(1) from error
    except ModelError as error:
        print_error(CommandError(str(error)))
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    except OSError as error:
        # Who reads the other end of a pipe may leave without a word from us, which the framework sees to.
        if error.errno in (None, errno.EPIPE):
            raise
        print_error(CommandError(str(error)))
        raise SystemExit(1) from error


def explain(error: grpc.RpcError, address: str) -> CommandError:
    """The message and the advice for a failed call."""
    failure = from_rpc_error(error)
    foreign_code = failure.metadata.get("grpc_code")
    if foreign_code == "UNAVAILABLE":
        return _unreachable(failure, address)
    if foreign_code == "UNIMPLEMENTED":
        return CommandError(f"{address} is not a Tandem gateway of this version.", "Check the address; workers have others.")
    message = f"{failure.message} [{failure.reason}]"
    for violation in failure.violations:
        if violation.description not in failure.message:
            message += f"\n  {violation.field}: {violation.description}"
    return CommandError(message, _advice(failure))


def _unreachable(failure: TandemError, address: str) -> CommandError:
    # gRPC's words for an address that refuses connections, or that no name server knows.
    if any(word in failure.message.lower() for word in ("connect", "resolv")):
        advice = "Start one with `tandem up`, or give the right address with --address HOST:PORT."
        return CommandError(f"No gateway answers at {address}.", advice)
    return CommandError(f"The connection to the gateway at {address} was lost: {failure.message}", "Is the suite still running?")


def _advice(failure: TandemError) -> str:
    advice = _ADVICE.get(failure.reason, "")
    if failure.retry_after_s and "again" not in advice:
        advice = f"{advice} Try again in {failure.retry_after_s:g} s.".strip()
    return advice

"""`tandem generate`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from tandem.api.v1 import generation_pb2, model_pb2
from tandem.cli.client import QUICK_S, Gateway, connect, run_command
from tandem.cli.requests import SamplingOptions, Turn, make_request
from tandem.cli.streaming import Answer, stream_answer, summary
from tandem.cli.terminal import CommandError, lenient_input, notes, output, write_text
from tandem.cli.trace import Trace, show_trace


@dataclass(frozen=True)
class GenerateOptions:
    """What `tandem generate` was told."""

    prompt: str
    address: str
    sampling: SamplingOptions
    chat: bool | None = None
    system: str | None = None
    logprobs: int | None = None
    trace: bool = False


def run_generate(options: GenerateOptions) -> None:
    run_command(_generate(options))


async def _generate(options: GenerateOptions) -> None:
    prompt = lenient_input().read() if options.prompt == "-" else options.prompt
    async with connect(options.address) as gateway:
        request = await _make_request(gateway, prompt, options)
        trace = Trace() if options.trace else None
        answer = await ask(gateway, request, trace)
        if options.logprobs is not None:
            notes().print(_logprob_table(answer))
        if trace is not None:
            await show_trace(gateway, trace, notes())


async def ask(gateway: Gateway, request: generation_pb2.GenerateRequest, trace: Trace | None = None) -> Answer:
    """Stream one answer to standard output and its summary to standard error."""
    console, answer = output(), Answer(time.monotonic())
    call = gateway.generation.Generate(request, metadata=trace.metadata if trace else None)
    try:
        await stream_answer(call, answer, lambda text: write_text(console, text))
    finally:
        if answer.pieces:
            console.out()
    notes().print(Text(summary(answer), style="dim"), soft_wrap=True)
    return answer


async def _make_request(gateway: Gateway, prompt: str, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    chat = await _wants_chat(gateway, options)
    if not chat and options.system is not None:
        raise CommandError("--system needs a conversation.", "Leave out --raw, or put the instructions into the prompt.")
    turns = [Turn("user", prompt)] if options.system is None else [Turn("system", options.system), Turn("user", prompt)]
    return make_request(turns if chat else prompt, options.sampling, options.logprobs)


async def _wants_chat(gateway: Gateway, options: GenerateOptions) -> bool:
    if options.chat is not None:
        return options.chat
    response = await gateway.models.GetModel(model_pb2.GetModelRequest(), timeout=QUICK_S)
    return bool(response.model.chat_capable)


def _logprob_table(answer: Answer) -> Table:
    """Each token with its probability, and the likeliest at its place."""
    table = Table("#", "token", "id", "logprob", "likeliest", box=None, pad_edge=False, header_style="dim")
    for number, logprob in enumerate(answer.logprobs):
        likeliest = "  ".join(f"{top.token!r} {top.logprob:.3f}" for top in logprob.top)
        table.add_row(str(number), Text(repr(logprob.token)), str(logprob.token_id), f"{logprob.logprob:.4f}", Text(likeliest))
    return table

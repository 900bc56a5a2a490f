"""Commands and their options. Each command imports its own work when it runs, so that `tandem --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MODEL = "smollm2-135m-instruct"
# What the contract's fields hold; what a model allows is the gateway's to say.
_INT32_MAX = 2**31 - 1
_UINT64_MAX = 2**64 - 1

app = typer.Typer(
    help=(
        "Tandem serves a language model as a suite of gRPC services: a gateway, prefill workers that read the prompt, and decode "
        "workers that write the answer.\n\nStart with [bold]tandem up[/], then ask from another terminal: "
        '[bold]tandem generate "Why is the sky blue?"[/] or [bold]tandem chat[/].'
    ),
    epilog="Every command has --help. If something does not work, run `tandem doctor` first.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """What a model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class KvDtype(StrEnum):
    """What KV is kept in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Weights(StrEnum):
    """How weights are held and multiplied."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    w4a8 = "w4a8"


def _check_workers(text: str) -> str:
    from tandem.cli.placement import parse_wish

    try:
        parse_wish(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _value(choice: StrEnum | None) -> str | None:
    return None if choice is None else choice.value


Workers = Annotated[
    str, typer.Option(metavar="N|DEVICES", callback=_check_workers, help="How many workers of the kind, or where: cuda:0,cuda:1.")
]
Address = Annotated[str, typer.Option("--address", "-a", metavar="HOST:PORT", help="The gateway's gRPC address.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions to the model, before the conversation.")]
Temperature = Annotated[float, typer.Option(help="How freely tokens are drawn; 0 always takes the likeliest.")]
TopP = Annotated[float | None, typer.Option(help="Draw only from the likeliest tokens that reach this probability.")]
TopK = Annotated[
    int | None, typer.Option(min=0, max=_INT32_MAX, metavar="N", help="Draw only from this many of the likeliest tokens.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=_UINT64_MAX, metavar="N", help="Names the random numbers: same seed, same answer.")
]


@app.command()
def up(
    *,
    model: Annotated[str, typer.Option("--model", "-m", envvar="TANDEM_MODEL", help="Name, path or hub name.")] = DEFAULT_MODEL,
    prefill: Workers = "1",
    decode: Workers = "1",
    host: Annotated[str, typer.Option(help="Interface that the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="TANDEM_PORT", help="The gateway's gRPC port.")] = 50051,
    dtype: Annotated[
        Dtype | None, typer.Option(help="float32 is exact, weights and KV; else KV is bfloat16. Default: TANDEM_DTYPE or auto.")
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(help="Weight format; auto: the fastest here of those that predict well. Default: TANDEM_WEIGHTS or auto."),
    ] = None,
    prefill_weights: Annotated[Weights | None, typer.Option(help="Another weight format for prefill.")] = None,
    decode_weights: Annotated[Weights | None, typer.Option(help="Another weight format for decode.")] = None,
    kv_dtype: Annotated[
        KvDtype | None,
        typer.Option(help="What KV is kept in; int8: half the bytes, on CPUs. Default: TANDEM_KV_DTYPE or auto, as --dtype says."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker. Default: its own choice.")] = None,
    ask: Annotated[list[str] | None, typer.Option(metavar="QUESTION", help="Ask this once it serves; repeatable.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop after the answer.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log lines of all processes.")] = False,
) -> None:
    """Start the whole suite on this machine, and keep it running until Ctrl-C.

    Fetches the model if need be, starts gateway and workers as processes, restarts one that dies, and stops all in order. Workers
    take the GPUs that there are, and the CPU where there is none.
    """
    from tandem.cli.plan import SuitePlan
    from tandem.cli.seats import find_seats
    from tandem.cli.up import UpOptions, run_up

    plan = SuitePlan(
        model,
        find_seats(prefill, decode),
        host=host,
        port=port,
        dtype=_value(dtype),
        kv_dtype=_value(kv_dtype),
        prefill_weights=_value(prefill_weights or weights),
        decode_weights=_value(decode_weights or weights),
        threads=threads,
    )
    run_up(UpOptions(plan, questions=tuple(ask or ()), once=once, verbose=verbose))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    *,
    address: Address = DEFAULT_ADDRESS,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="As a conversation, or as plain text to go on from. Default: chat if the model can."),
    ] = None,
    system: System = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, max=_INT32_MAX, metavar="N", help="Most tokens to generate.")
    ] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, metavar="N", help="Show each token's probability and its N likeliest.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the time went, process by process.")] = False,
) -> None:
    """Stream one answer to standard output; a summary follows on standard error."""
    from tandem.cli.generate import GenerateOptions, run_generate
    from tandem.cli.requests import SamplingOptions

    sampling = SamplingOptions(max_tokens, temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ()))
    run_generate(GenerateOptions(prompt, address, sampling, chat=chat, system=system, logprobs=logprobs, trace=trace))


@app.command()
def chat(
    *,
    address: Address = DEFAULT_ADDRESS,
    system: System = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, max=_INT32_MAX, metavar="N", help="Most tokens of an answer.")
    ] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk with the model in the terminal. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    from tandem.cli.chat import run_chat
    from tandem.cli.requests import SamplingOptions

    run_chat(address, SamplingOptions(max_tokens, temperature, top_p=top_p, top_k=top_k, seed=seed), system)


@app.command()
def status(
    address: Address = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Show the workers: queues, free KV blocks, speeds."""
    from tandem.cli.status import run_status

    run_status(address, watch)


@app.command()
def pull(model: Annotated[str, typer.Argument(help="A known name or a hub name.")] = DEFAULT_MODEL) -> None:
    """Fetch a model into the cache and verify every byte of it."""
    from tandem.cli.pull import run_pull

    run_pull(model)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model to look for.", show_default=DEFAULT_MODEL)] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to look at.")] = 50051,
    verify_handoff: Annotated[
        bool,
        typer.Option(
            "--verify-handoff", help="Also compute with and without a hand-off, and compare logits. Default model: random:tiny."
        ),
    ] = False,
    kv_dtype: Annotated[KvDtype, typer.Option(help="What KV is kept in while a hand-off is verified.")] = KvDtype.auto,
) -> None:
    """Say what this machine can do, and what is missing for the rest."""
    from tandem.cli.doctor import run_doctor

    verified = (model or "random:tiny") if verify_handoff else None
    run_doctor(model or DEFAULT_MODEL, port, verified, kv_dtype.value)


def _check_weights(text: str) -> str:
    formats = [format.value for format in Weights if format is not Weights.auto]
    unknown = [name for item in text.split(",") for name in item.split("/") if name not in formats]
    if unknown or any(item.count("/") > 1 for item in text.split(",")):
        raise typer.BadParameter(f"takes {', '.join(formats)}, or two of them for prefill/decode, separated by commas")
    return text


@app.command("eval")
def evaluate(
    *,
    model: Annotated[str, typer.Option("--model", "-m", envvar="TANDEM_MODEL", help="Name, path or hub name.")] = DEFAULT_MODEL,
    weights: Annotated[
        str, typer.Option(metavar="FORMATS", callback=_check_weights, help="What to compare: int8,int4, or int8/int4 by role.")
    ] = "fp32,bf16,int8,int4,w4a8",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="The text. Default: one that this machine has.")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Most tokens of it.")] = 4096,
    window: Annotated[int, typer.Option(min=4, help="Tokens of a context; half of them are prompt.")] = 512,
    kv_dtype: Annotated[KvDtype, typer.Option(help="What KV is kept in; auto: bfloat16.")] = KvDtype.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with. Default: one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what formats of weights and KV cost on the CPU: perplexity and likeliest tokens, against the model's file in fp32."""
    from tandem.cli.evaluate import EvalOptions, run_eval

    run_eval(EvalOptions(model, tuple(weights.split(",")), text, tokens, window, kv_dtype.value, threads, as_json))


@app.command()
def version() -> None:
    """Show versions."""
    from tandem.cli.versions import run_version

    run_version()

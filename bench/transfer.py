"""`python -m bench.transfer`: the hand-off alone, from a producer in a child process to a consumer in this one.

Two figures for each transport and size: GB/s of a whole prompt that is ready at once, and the hand-off's latency when only the last
chunk is still missing: from the producer's learning that the chunk is computed (`finish`) until the consumer has verified it all.
Both processes read the same clock (CLOCK_MONOTONIC). With `--gpu` the pools lie in GPU memory: of one GPU that both processes
share, and, where there are two, of one each; and a table of what a pull is made of comes first. Prints tables, writes JSON.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.options import new_parser
from bench.transfer_processes import Case, Consumer, Export, Figures, Pair, ask, load_native, producer_process
from bench.transfer_protection import bare, measure_cost
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool

_LLAMA_8B = KvLayout(32, 8, 128, 16, "bfloat16")
_GPU_TOKENS = (16, 256, 1024, 8192)
_SLOW_BYTES = 1 << 29
"""Beyond it a transport through the host takes too long for many rounds."""


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    load_native()
    name, run = ("transfer_gpu", _on_gpus) if arguments.gpu else ("transfer", _on_cpu)
    if arguments.protection:
        name, run = "transfer_protection", _protection
    results = dict(run(arguments))
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {path}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("transfer", "Measures the KV hand-off between two processes of this machine.")
    parser.add_argument("--gpu", action="store_true", help="pools in GPU memory, Llama-3.1-8B's blocks, several sizes")
    parser.add_argument("--protection", action="store_true", help="what checksums and heartbeats cost, on the CPU")
    parser.add_argument("--transports", nargs="+", help="default: all that such pools can take")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"], help="of K and V")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="tokens of the prompt whose blocks are handed over")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens of the last chunk, which comes late")
    parser.add_argument("--rounds", type=int, default=30, help="hand-offs of each case")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for JSON")
    return parser.parse_args(argv)


def _on_cpu(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """SmolLM2-135M's blocks: 30 layers, 3 KV heads of 64."""
    transports = arguments.transports or ["shm", "tcp"]
    cases = [Case(name, arguments.prompt_tokens, arguments.chunk_tokens, arguments.rounds) for name in transports]
    for dtype in arguments.dtypes:
        layout = KvLayout(30, 3, 64, 16, dtype)
        pair = Pair(layout, layout.blocks_for(arguments.prompt_tokens), "cpu", "cpu")
        rows = measure(pair, cases)
        print_table(rows, f"{dtype}, the last {arguments.chunk_tokens} tokens late")
        yield dtype, rows


def _protection(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for dtype in arguments.dtypes:
        layout = KvLayout(30, 3, 64, 16, dtype)
        pair = Pair(layout, layout.blocks_for(arguments.prompt_tokens), "cpu", "cpu")
        rows = {}
        for name in arguments.transports or ["shm", "tcp"]:
            case = Case(name, arguments.prompt_tokens, arguments.chunk_tokens, arguments.rounds)
            with (
                producer_process(pair) as protected,
                producer_process(bare(pair)) as unprotected,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                rows[name] = asdict(runner.run(measure_cost((protected, unprotected), pair, case)))
        print_table(rows, f"{dtype}: with checksums and heartbeats, and without")
        yield dtype, rows


def _on_gpus(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    import torch

    for consumer in range(min(2, torch.cuda.device_count())):
        transports = arguments.transports or ["cuda_ipc", *(["nccl"] if consumer else []), "tcp"]
        cases = [_gpu_case(name, tokens, arguments.rounds) for name in transports for tokens in _GPU_TOKENS]
        pair = Pair(_LLAMA_8B, _LLAMA_8B.blocks_for(max(_GPU_TOKENS)) + 64, "cuda:0", f"cuda:{consumer}")
        where = f"{pair.producer_device} to {pair.consumer_device}, {torch.cuda.get_device_name(consumer)}"
        parts = measure_gpu_parts(pair)
        print_table(parts, f"{where}: parts of a pull over cuda_ipc")
        rows = measure(pair, cases)
        print_table(rows, f"{where}: hand-off")
        yield where, {"parts": parts, "hand-off": rows}


def _gpu_case(transport: str, tokens: int, rounds: int) -> Case:
    through_host = transport == "tcp" and _LLAMA_8B.blocks_for(tokens) * _LLAMA_8B.block_bytes > _SLOW_BYTES
    return Case(transport, tokens, min(512, tokens), min(rounds, 4) if through_host else rounds)


def measure(pair: Pair, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Runs the producer in a child process for as long as the measurement lasts."""
    with producer_process(pair) as pipe, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(consume(pipe, pair, cases))
    return {name: asdict(row) for name, row in figures.items()}


async def consume(pipe: Connection, pair: Pair, cases: Sequence[Case]) -> dict[str, Figures]:
    pool = KvPool.create(pair.layout, pair.num_blocks, pair.consumer_device)
    pool.tensor.zero_()
    rows = {}
    for transport in dict.fromkeys(case.transport for case in cases):
        async with Consumer.over(pipe, pool, transport) as consumer:
            for case in cases:
                if case.transport == transport:
                    rows[f"{transport}, {case.prompt_tokens} tokens"] = await consumer.measure(case)
    pool.close()
    return rows


def measure_gpu_parts(pair: Pair) -> dict[str, dict[str, float]]:
    import torch

    from bench.transfer_parts import measure_parts

    torch.cuda.set_device(pair.consumer_device)
    with producer_process(pair) as pipe:
        exported = asyncio.run(ask(pipe, Export()))
        pool = KvPool.create(pair.layout, pair.num_blocks, pair.consumer_device)
        rows = measure_parts(exported, pool, (1, 16, 32, 64, 128))
        pool.close()
    return {name: asdict(row) for name, row in rows.items()}


def print_table(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in next(iter(rows.values())):
        table.add_column(heading.replace("_", " "), justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:,.2f}" for value in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

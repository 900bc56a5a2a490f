"""Which weight format a CPU worker takes: the narrowest that is no slower than fp32 and predicts well, measured on the model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from llm.batch import SequenceSlice
from llm.config import load_model_config
from llm.cores import usable_cores
from llm.errors import UnsupportedModelError
from llm.format_check import ALLOWED_CHANGE, LEAST_AGREEMENT, Checker, Verdict
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.remembered import remembered
from llm.runner import ModelRunner, RunnerSettings
from llm.weight_format import FORMATS, WeightFormat
from llm.weights import ModelFiles, Progress
from llm.weights_file import lock_file
from llm.weights_plan import plan_tensors

logger = logging.getLogger(__name__)

Role = Literal["prefill", "decode"]
_PROMPT_TOKENS = 256
_CONTEXT_TOKENS = 128
_BATCHES = (1, 16)
_BLOCK_TOKENS = 16
_REPEATS = 3
_LIMITS = f"{100 * ALLOWED_CHANGE:g} % and {100 * LEAST_AGREEMENT:g} %"
_NARROWEST_FIRST: tuple[WeightFormat, ...] = ("int4", "int8", "bf16")
_MARGIN = 1.1
"""fp32 must be this much faster to be chosen: narrower formats take less memory."""


@dataclass(frozen=True)
class FormatChoice:
    """The format, and why, for people."""

    format: WeightFormat
    reason: str


def settle_format(files: ModelFiles, settings: RunnerSettings, progress: Progress) -> RunnerSettings:
    """The settings with a format in them, and the reason. Measured once for each role, model, machine and set of kernels,
    so that the workers of one machine agree, and start sooner.

    Takes up to a minute the first time. Raises UnsupportedModelError, WeightsError.
    """
    if settings.told_format is not None or settings.device != "cpu":
        return settings
    kv_dtype = settings.kv_dtype
    settings = replace(settings, kv_dtype="auto")  # weights are judged by themselves
    directory = settings.cache_directory / "formats"
    directory.mkdir(parents=True, exist_ok=True)
    with lock_file(directory / "choosing.lock", lambda: progress(0.0, "waiting for another worker that chooses its weight format")):
        choice = remembered(_path(files, settings), known_choice, lambda: _choose(files, settings, progress))
    logger.info("%s weights: %s", choice.format, choice.reason)
    return replace(settings, weights=choice.format, weights_reason=choice.reason, kv_dtype=kv_dtype)


def known_choice(known: Mapping[str, Any]) -> FormatChoice:
    """As an earlier start of a worker wrote it down. Raises KeyError or TypeError for a format that there is not."""
    return FormatChoice({format: format for format in FORMATS}[known["format"]], str(known["reason"]))


def _path(files: ModelFiles, settings: RunnerSettings) -> Path:
    """`tandem doctor` knows these names too."""
    name = f"{settings.role}-{files.digest.replace(':', '-')[:40]}-{machine_name(settings.threads or 0)}-{kernels_name()}.json"
    return settings.cache_directory / "formats" / name


def machine_name(threads: int) -> str:
    """Names what a measurement depends on beside the model: processor, threads and torch's version."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    cores = usable_cores() if threads == 0 else threads
    return hashlib.sha256(f"{processor} {cores} {torch.__version__}".encode()).hexdigest()[:16]


def kernels_name() -> str:
    """Names the kernels: another text whenever their code changes."""
    folder = Path(__file__).parent / "ops"
    sources = (path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".h", ".cpp"))
    return hashlib.blake2b(b"".join(sources), digest_size=6).hexdigest()


def _choose(files: ModelFiles, settings: RunnerSettings, progress: Progress) -> FormatChoice:
    if _exact_bytes(files) > psutil.virtual_memory().total // 2:
        return FormatChoice("bf16", "the model is too large to be compared with fp32 here")
    with contextlib.closing(Checker(files, settings, progress, kernels_name())) as checker:
        return pick(lambda format: _measured(files, settings, format, progress), checker.verdict, _description(settings.role))


def pick(
    measure: Callable[[WeightFormat], Sequence[float] | None], verdict: Callable[[WeightFormat], Verdict], measured: str
) -> FormatChoice:
    """The narrowest that passes and is no slower than fp32. What is wider than that is not looked at: it would have to be converted
    first, reads more, and multiplies no faster.

    `measure` gives the seconds of some steps, or None where there are no kernels; fp32 always has some, and always passes.
    """
    exact = measure("fp32")
    assert exact is not None, "fp32 is always measured"
    times, judged = {"fp32": exact}, list[str]()

    def choice(format: WeightFormat) -> FormatChoice:
        told = ", ".join(f"{name} {_milliseconds(seconds)} ms" for name, seconds in times.items())
        return FormatChoice(format, "; ".join([f"measured {measured}: {told}", *judged]))

    for format in _NARROWEST_FIRST:
        seconds = measure(format)
        if seconds is None:
            continue
        times[format] = seconds
        if sum(seconds) > _MARGIN * sum(exact):
            continue
        found = verdict(format)
        judged.append(
            f"against fp32: {found.words}"
            if found.passed
            else f"{format} not taken unasked: {found.words}, where {_LIMITS} are wanted"
        )
        if found.passed:
            return choice(format)
    return choice("fp32")


def _exact_bytes(files: ModelFiles) -> int:
    config = load_model_config(files.format, files.path, files.random_config)
    return 4 * sum(item.shape[0] * item.shape[1] for item in plan_tensors(config) if item.is_matrix)


def _measured(files: ModelFiles, settings: RunnerSettings, format: WeightFormat, progress: Progress) -> list[float] | None:
    """None for a format that this machine has no kernels for."""
    progress(0.0, f"choosing the weight format: measuring {format}")
    try:
        runner = ModelRunner.load(files, replace(settings, weights=format), progress)
    except UnsupportedModelError as error:
        logger.info("%s is left out: %s", format, error)
        return None
    return _measure(runner, settings.role)


def _measure(runner: ModelRunner, role: Role) -> list[float]:
    config = runner.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, _BLOCK_TOKENS, runner.kv_dtype)
    steps = list(_steps(role, config.context_tokens, layout))
    pool = KvPool.create(layout, 1 + max(max(each.block_ids) for step in steps for each in step))
    try:
        runner.attach(pool)
        return [_time(runner, step) for step in steps]
    finally:
        pool.close()


def _steps(role: Role, context_tokens: int, layout: KvLayout) -> Iterator[list[SequenceSlice]]:
    """A prompt, or batches of sequences with some context; small models have less room."""
    if role == "prefill":
        count = min(_PROMPT_TOKENS, context_tokens)
        yield [SequenceSlice([0] * count, 0, range(layout.blocks_for(count)))]
        return
    context = min(_CONTEXT_TOKENS, context_tokens - 1)
    blocks = layout.blocks_for(context + 1)
    for size in _BATCHES:
        yield [SequenceSlice([0], context, range(index * blocks, (index + 1) * blocks)) for index in range(size)]


def _time(runner: ModelRunner, step: list[SequenceSlice]) -> float:
    runner.forward(step)  # compiles and touches what it needs
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        runner.forward(step)
        best = min(best, time.perf_counter() - start)
    return best


def _description(role: Role) -> str:
    return f"at {_PROMPT_TOKENS} prompt tokens" if role == "prefill" else f"at batches of {' and '.join(map(str, _BATCHES))}"


def _milliseconds(seconds: Sequence[float]) -> str:
    return " and ".join(f"{1000 * value:.1f}" for value in seconds)

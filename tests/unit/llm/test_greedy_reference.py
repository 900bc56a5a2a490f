"""The real model's greedy tokens in float32, however its tokens are fed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import ModelRunner, RunnerSettings, SequenceSlice
from tandem.models import DEFAULT_MODEL, ModelError, cache_directory, resolve_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

BLOCKS = 6
"""Blocks of each sequence."""


def load(dtype: Any) -> ModelRunner:
    try:
        files = resolve_model(os.environ.get("TANDEM_TEST_MODEL", DEFAULT_MODEL), download=False)
    except ModelError as error:
        pytest.skip(str(error))
    runner = ModelRunner.load(files, RunnerSettings("decode", dtype=dtype, threads=2, cache_directory=cache_directory()))
    config = runner.config
    pool = KvPool.create(KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, runner.kv_dtype), 24)
    pool.tensor.fill_(float("nan"))
    runner.attach(pool)
    return runner


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return load("float32")


@pytest.fixture(scope="module")
def prompts(repository: Path) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((repository / "tests/data/smollm2_greedy.json").read_text())["prompts"]
    return result


def feed(runner: ModelRunner, tokens: list[int], chunk: int, blocks: list[int], start: int = 0) -> torch.Tensor:
    """Computes a prompt by chunks; the last token's logits."""
    for at in range(start, len(tokens), chunk):
        part = tokens[at : at + chunk]
        logits = runner.forward([SequenceSlice(part, at, blocks, "last" if at + chunk >= len(tokens) else "none")])
    return logits[0]


def follow(runner: ModelRunner, tokens: list[int], first: torch.Tensor, blocks: list[int], count: int = 32) -> list[int]:
    drawn, logits = [], first
    for _ in range(count):
        drawn.append(int(logits.argmax()))
        logits = runner.forward([SequenceSlice(drawn[-1:], len(tokens) + len(drawn) - 1, blocks)])[0]
    return drawn


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_any_chunk_size(runner: ModelRunner, prompts: list[dict[str, Any]], chunk: int) -> None:
    for prompt in prompts:
        logits = feed(runner, prompt["prompt_ids"], chunk, [5, 3, 9, 1, 2, 8])
        expected = torch.tensor(prompt["first_step_top5_logits"])
        assert (logits[prompt["first_step_top5_ids"]] - expected).abs().max() < 1e-3
        assert float(logits.logsumexp(0)) == pytest.approx(prompt["first_step_logsumexp"], abs=1e-3)
        assert follow(runner, prompt["prompt_ids"], logits, [5, 3, 9, 1, 2, 8]) == prompt["greedy_ids"]


def test_together_in_one_batch(runner: ModelRunner, prompts: list[dict[str, Any]]) -> None:
    blocks = [list(range(BLOCKS * index, BLOCKS * index + BLOCKS)) for index in range(len(prompts))]
    logits = runner.forward([SequenceSlice(prompt["prompt_ids"], 0, where) for prompt, where in zip(prompts, blocks, strict=True)])
    drawn: list[list[int]] = [[] for _ in prompts]
    for step in range(32):
        for tokens, row in zip(drawn, logits, strict=True):
            tokens.append(int(row.argmax()))
        starts = [len(prompt["prompt_ids"]) + step for prompt in prompts]
        logits = runner.forward([SequenceSlice(t[-1:], at, where) for t, at, where in zip(drawn, starts, blocks, strict=True)])
    assert drawn == [prompt["greedy_ids"] for prompt in prompts]


def test_over_blocks_of_a_cached_prefix(runner: ModelRunner, prompts: list[dict[str, Any]]) -> None:
    for prompt in prompts:
        tokens = prompt["prompt_ids"]
        feed(runner, tokens[:16], 16, [20])
        logits = feed(runner, tokens, 512, [20, 1, 2, 3, 4, 5], start=16)
        assert follow(runner, tokens, logits, [20, 1, 2, 3, 4, 5]) == prompt["greedy_ids"]


def test_the_default_format_stays_near(prompts: list[dict[str, Any]]) -> None:
    runner = load("bfloat16")
    for prompt in prompts:
        logits = feed(runner, prompt["prompt_ids"], 16, [5, 3, 9, 1, 2, 8])
        assert (logits[prompt["first_step_top5_ids"]] - torch.tensor(prompt["first_step_top5_logits"])).abs().max() < 0.5

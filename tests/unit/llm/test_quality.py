"""Perplexity, agreement and divergence of a format against the exact one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.batch import SequenceSlice
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.quality import Pair, Tally, blocks_needed, compare, windows_of
from llm.runner import ModelRunner, RunnerSettings

WINDOW = 24


def pair_of(files: Any, dtype: Any, cache: Path) -> Pair:
    runners = [ModelRunner.load(files, RunnerSettings(role, dtype=dtype, threads=1, cache_directory=cache)) for role in ROLES]
    config = runners[0].config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, 4, runners[0].kv_dtype)
    return Pair(*runners, KvPool.create(layout, blocks_needed(WINDOW, 4)))


ROLES = ("prefill", "decode")


def tokens(count: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(5)).tolist()


def test_a_tally_knows_a_hand_made_case() -> None:
    tally = Tally()
    reference, actual = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log(), torch.tensor([[0.25, 0.75], [0.8, 0.2]]).log()
    tally.add(reference, actual, torch.tensor([0, 1]))
    assert tally.positions == 2
    assert tally.perplexity == pytest.approx(1 / math.sqrt(0.25 * 0.2))
    assert tally.perplexity_ratio == pytest.approx(math.sqrt(2))
    assert tally.mean_divergence == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)))
    assert tally.agreement == 0.5


def test_a_format_is_the_same_as_itself(random_files: Any, tmp_path: Path) -> None:
    files = random_files()
    reference, other = pair_of(files, "float32", tmp_path), pair_of(files, "float32", tmp_path)
    (quality,) = compare(reference, [other], windows_of(tokens(11 * WINDOW + 3), WINDOW), lambda fraction: None)
    assert quality.prefill.positions == 11 * WINDOW // 2
    assert quality.decode.positions == 11 * (WINDOW // 2 - 1)
    for tally in (quality.prefill, quality.decode):
        assert (tally.agreement, tally.perplexity_ratio) == (1.0, 1.0)
        assert tally.mean_divergence == pytest.approx(0, abs=1e-12)


def test_prefill_and_decode_predict_as_one_pass_does(random_files: Any, tmp_path: Path) -> None:
    """The halves join without a gap: their losses are those of all positions in one step."""
    files = random_files()
    reference = pair_of(files, "float32", tmp_path)
    windows = windows_of(tokens(3 * WINDOW), WINDOW)
    (quality,) = compare(reference, [pair_of(files, "float32", tmp_path)], windows, lambda fraction: None)
    reference.prefill.attach(reference.pool)
    expected = 0.0
    for window in windows:
        logits = reference.prefill.forward([SequenceSlice(window[:-1], 0, range(WINDOW // 4), "all")])
        expected += float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(window[1:]), reduction="sum"))
    assert quality.prefill.loss + quality.decode.loss == pytest.approx(expected, rel=1e-5)


def test_narrower_weights_cost_something_in_both_roles(random_files: Any, tmp_path: Path) -> None:
    files, done = random_files(), []
    (quality,) = compare(
        pair_of(files, "float32", tmp_path), [pair_of(files, "bfloat16", tmp_path)], windows_of(tokens(96), WINDOW), done.append
    )
    assert 0 < quality.prefill.mean_divergence < 1e-3
    assert 0 < quality.decode.mean_divergence < 1e-3
    assert done == sorted(done) and done[-1] == 1.0


def test_what_fills_no_window_is_left_out() -> None:
    assert windows_of(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(range(3), 4) == []

"""How far a model's predictions move when its weights take another format. Teacher-forced: every format is fed the same tokens.

The first half of each window goes through prefill in chunks, the second half through decode, token by token and many windows at
once, over the KV that prefill wrote: as requests are served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llm.batch import SequenceSlice
from llm.runner import ModelRunner, Pool

TOGETHER = 8
"""Windows that are computed together."""
_CHUNK_TOKENS = 32

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Pair:
    """One model in the formats of its two roles. Blocks of `pool` from 0 on are overwritten; it holds TOGETHER windows."""

    prefill: ModelRunner
    decode: ModelRunner
    pool: Pool


@dataclass
class Tally:
    """Sums over positions, in nats."""

    positions: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreements: int = 0

    def add(self, reference: torch.Tensor, actual: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [n, vocab] of both, and the tokens [n] that came next."""
        expected, found = torch.log_softmax(reference, -1), torch.log_softmax(actual, -1)
        rows = torch.arange(len(targets))
        self.positions += len(targets)
        self.reference_loss -= float(expected[rows, targets].sum(dtype=torch.float64))
        self.loss -= float(found[rows, targets].sum(dtype=torch.float64))
        self.divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        self.agreements += int((expected.argmax(-1) == found.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.positions)

    @property
    def perplexity_ratio(self) -> float:
        """To the reference's: 1.01 is one per cent worse."""
        return math.exp((self.loss - self.reference_loss) / self.positions)

    @property
    def mean_divergence(self) -> float:
        """Kullback-Leibler, from the reference: what a draw by the format instead of the reference loses on average."""
        return self.divergence / self.positions

    @property
    def agreement(self) -> float:
        """How often the likeliest token is the reference's."""
        return self.agreements / self.positions


@dataclass
class Quality:
    """What a pair of formats did to the predictions within the prompt, and to those behind it."""

    prefill: Tally = field(default_factory=Tally)
    decode: Tally = field(default_factory=Tally)


def windows_of(tokens: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Pieces of equal length; a rest that fills none is left out."""
    starts = range(0, len(tokens) - window_tokens + 1, window_tokens)
    return [list(tokens[start : start + window_tokens]) for start in starts]


def blocks_needed(window_tokens: int, block_tokens: int) -> int:
    """Blocks of a pair's pool."""
    return TOGETHER * -(-window_tokens // block_tokens)


def compare(reference: Pair, pairs: Sequence[Pair], windows: Sequence[Sequence[int]], progress: Progress) -> list[Quality]:
    """The quality of each pair against the reference. All windows have the same length, at least 4 tokens."""
    qualities = [Quality() for _ in pairs]
    groups = [windows[start : start + TOGETHER] for start in range(0, len(windows), TOGETHER)]
    for number, group in enumerate(groups):

        def report(done: float, number: int = number) -> None:
            progress((number + done) / len(groups))

        _compare_group(reference, pairs, group, qualities, report)
    return qualities


def _compare_group(
    reference: Pair, pairs: Sequence[Pair], windows: Sequence[Sequence[int]], qualities: Sequence[Quality], progress: Progress
) -> None:
    length = len(windows[0])
    middle, last = length // 2, length - 1
    for start in range(0, middle, _CHUNK_TOKENS):
        end = min(start + _CHUNK_TOKENS, middle)
        expected = _logits(reference.prefill, reference.pool, windows, start, end)
        targets = _tokens_between(windows, start + 1, end + 1)
        for pair, quality in zip(pairs, qualities, strict=True):
            quality.prefill.add(expected, _logits(pair.prefill, pair.pool, windows, start, end), targets)
        progress(end / last)
    for at in range(middle, last):
        expected = _logits(reference.decode, reference.pool, windows, at, at + 1)
        targets = _tokens_between(windows, at + 1, at + 2)
        for pair, quality in zip(pairs, qualities, strict=True):
            quality.decode.add(expected, _logits(pair.decode, pair.pool, windows, at, at + 1), targets)
        progress((at + 1) / last)


def _logits(runner: ModelRunner, pool: Pool, windows: Sequence[Sequence[int]], start: int, end: int) -> torch.Tensor:
    """[windows * (end - start), vocab] of the tokens from `start` to `end` of every window."""
    runner.attach(pool)
    blocks = -(-len(windows[0]) // pool.tensor.shape[4])
    slices = [
        SequenceSlice(list(window[start:end]), start, range(index * blocks, (index + 1) * blocks), "all")
        for index, window in enumerate(windows)
    ]
    return runner.forward(slices)


def _tokens_between(windows: Sequence[Sequence[int]], start: int, end: int) -> torch.Tensor:
    return torch.tensor([token for window in windows for token in window[start:end]])

"""Whether a weight format predicts well enough to be chosen without being asked for.

Checked on texts that the model itself writes, with float32 weights and KV: a worker has no tokenizer, and no text. There the
expected change of the perplexity is what the divergence of the two predictions says, without the chance of single tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from llm.batch import SequenceSlice
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.quality import TOGETHER, Pair, blocks_needed, compare
from llm.remembered import remembered
from llm.runner import ModelRunner, RunnerSettings
from llm.weight_format import WeightFormat
from llm.weights import ModelFiles, Progress

ALLOWED_CHANGE = 0.01
"""Of the perplexity, within prompts and behind them."""
LEAST_AGREEMENT = 0.98
"""How often the likeliest token must be that of fp32. Small models have many near ties, and another greedy token is another answer:
a model of 135 million parameters kept 96 % and 0.5 % of perplexity in four bits, and answered a plain question with nonsense."""
_WINDOW_TOKENS = 96
_BLOCK_TOKENS = 16
_SEED = 1


@dataclass(frozen=True)
class Verdict:
    """By how much the perplexity is expected to grow (0.01 is one per cent), and how often the likeliest token stays."""

    prefill_change: float
    decode_change: float
    prefill_agreement: float
    decode_agreement: float

    @property
    def passed(self) -> bool:
        changes, agreements = (self.prefill_change, self.decode_change), (self.prefill_agreement, self.decode_agreement)
        return max(changes) <= ALLOWED_CHANGE and min(agreements) >= LEAST_AGREEMENT

    @property
    def words(self) -> str:
        """The worse of the two roles, for people."""
        change, agreement = max(self.prefill_change, self.decode_change), min(self.prefill_agreement, self.decode_agreement)
        return f"perplexity {100 * change:+.2f} %, {100 * agreement:.1f} % of the likeliest tokens kept"


class Checker:
    """Compares formats of one model with the exact one. The caller closes it; what it learns is remembered on disk."""

    def __init__(self, files: ModelFiles, settings: RunnerSettings, progress: Progress, kernels: str) -> None:
        self._files, self._settings, self._progress, self._kernels = files, settings, progress, kernels
        self._reference: Pair | None = None
        self._windows: list[list[int]] = []
        self._pools: list[KvPool] = []

    def verdict(self, format: WeightFormat) -> Verdict:
        """Takes some ten seconds for a small model that is not known."""
        name = f"quality-{self._files.digest.replace(':', '-')[:40]}-{format}-{self._kernels}.json"
        path = self._settings.cache_directory / "formats" / name
        return remembered(path, lambda known: Verdict(**known), lambda: self._check(format))

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self._reference = None

    def _check(self, format: WeightFormat) -> Verdict:
        stage = f"choosing the weight format: comparing {format} with fp32"
        self._progress(0.0, stage)
        if self._reference is None:
            self._reference = self._pair(replace(self._settings, dtype="float32", weights="auto"))
            self._windows = draw_windows(self._reference, self._window_tokens)
        pair = self._pair(replace(self._settings, weights=format))
        (quality,) = compare(self._reference, [pair], self._windows, lambda done: self._progress(done, stage))
        tallies = (quality.prefill, quality.decode)
        return Verdict(*(math.expm1(tally.mean_divergence) for tally in tallies), *(tally.agreement for tally in tallies))

    @property
    def _window_tokens(self) -> int:
        assert self._reference is not None, "loaded first"
        return min(_WINDOW_TOKENS, self._reference.decode.config.context_tokens)

    def _pair(self, settings: RunnerSettings) -> Pair:
        """The same format in both roles: which one the other role takes is not known."""
        prefill, decode = (
            ModelRunner.load(self._files, replace(settings, role=role), self._progress) for role in ("prefill", "decode")
        )
        config = prefill.config
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, _BLOCK_TOKENS, prefill.kv_dtype)
        self._pools.append(KvPool.create(layout, blocks_needed(min(_WINDOW_TOKENS, config.context_tokens), _BLOCK_TOKENS)))
        return Pair(prefill, decode, self._pools[-1])


def draw_windows(pair: Pair, window_tokens: int) -> list[list[int]]:
    """Texts as the model writes them when nothing but chance directs it, each from another first token; the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = pair.decode.config.vocab_size
    windows: list[list[int]] = torch.randint(vocabulary, (TOGETHER, 1), generator=generator).tolist()
    blocks = -(-window_tokens // pair.pool.tensor.shape[4])
    pair.decode.attach(pair.pool)
    for at in range(window_tokens - 1):
        slices = [
            SequenceSlice(window[-1:], at, range(index * blocks, (index + 1) * blocks)) for index, window in enumerate(windows)
        ]
        drawn = torch.multinomial(torch.softmax(pair.decode.forward(slices), -1), 1, generator=generator)
        for window, token in zip(windows, drawn[:, 0].tolist(), strict=True):
            window.append(token)
    return windows

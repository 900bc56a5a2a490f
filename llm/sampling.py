"""Draws tokens. Each result is a pure function of its own row: logits, parameters, seed, position and token history.

So a request draws the same tokens alone or among others, on one worker or another, moved or resumed. For that, sums over a row
run on one thread and in one order, however many rows there are. Weights made by numpy, or on another instruction set, may differ in
their last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from llm.ops.cpu.native import library
from llm.ops.cpu.native.draw import GROUP, weigh
from llm.sampling_params import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]
"""Of each GROUP of weights: only the group that a draw falls into is scanned."""

_CANDIDATES = (512, 8192)
"""top_p looks at this many of the likeliest tokens first, and sorts more only if they do not reach it."""


@dataclass(frozen=True)
class SampleRow:
    """What is known of a row. The token drawn has position len(token_ids)."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and completion so far."""
    num_prompt_tokens: int
    forbidden_token_ids: Sequence[int] = ()
    num_logprobs: int | None = None
    """How many of the likeliest tokens to report beside the drawn one; None reports nothing."""

    @cached_property
    def fits_device(self) -> bool:
        """Whether a GPU can draw the row by itself; penalties, forbidden tokens and log-probabilities are the host's affair."""
        return self.num_logprobs is None and not self.forbidden_token_ids and not self.params.has_penalties


@dataclass(slots=True)
class SampledToken:
    """A token; its log-probability and the likeliest tokens under the unmodified logits, if they were asked for.

    Left as made; not frozen, as llm.batch.SequenceSlice says.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """logits [rows, vocab] float32, left as they are -> one token a row."""
    assert logits.shape[0] == len(rows), "one row of logits for each sequence"
    drawn: dict[int, int] = {}
    plain = [index for index, row in enumerate(rows) if _is_plain_greedy(row)]
    if plain:
        likeliest = _argmax(logits if len(plain) == len(rows) else logits[plain])
        drawn = dict(zip(plain, likeliest, strict=True))
    return [_sample_row(logits[index], row, drawn.get(index)) for index, row in enumerate(rows)]


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[SampledToken]:
    """The log-probabilities of given tokens, one for each row of logits [rows, vocab], and of the `count` likeliest."""
    return [_with_logprobs(row.cpu().numpy(), token, count) for row, token in zip(logits, token_ids, strict=True)]


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 bits: a hash of seed and position, so there is no generator state to keep or ship."""
    key = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / (1 << 53)


def _argmax(logits: torch.Tensor) -> list[int]:
    """The first of the highest. On a CPU numpy's is several times faster than torch's."""
    if logits.device.type == "cpu":
        return [int(row.argmax()) for row in logits.numpy()]
    likeliest: list[int] = logits.argmax(dim=-1).tolist()
    return likeliest


def _is_plain_greedy(row: SampleRow) -> bool:
    return row.params.is_greedy and not row.params.has_penalties and not row.forbidden_token_ids


def _sample_row(logits: torch.Tensor, row: SampleRow, drawn: int | None) -> SampledToken:
    if drawn is not None and row.num_logprobs is None:
        return SampledToken(drawn)
    raw: Floats = logits.cpu().numpy()
    token = _draw(raw, row) if drawn is None else drawn
    return SampledToken(token) if row.num_logprobs is None else _with_logprobs(raw, token, row.num_logprobs)


def _draw(raw: Floats, row: SampleRow) -> int:
    params = row.params
    values = _adjust(raw, row)
    if params.is_greedy:
        return int(values.argmax())
    random = uniform(params.seed, len(row.token_ids))
    weights, sums = _weights(values, params.temperature)
    if not params.has_filters:
        return _pick(weights, sums, random)
    kept = _filter(weights, float(sums.sum()), params)
    return int(kept[_pick(weights[kept], _sums(weights[kept]), random)])


def _adjust(raw: Floats, row: SampleRow) -> Floats:
    """Penalties and forbidden tokens, on a copy if there are any."""
    if not row.params.has_penalties and not row.forbidden_token_ids:
        return raw
    values = raw.copy()
    if row.params.has_penalties:
        _penalise(values, row)
    values[list(row.forbidden_token_ids)] = -np.inf
    return values


def _penalise(values: Floats, row: SampleRow) -> None:
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = np.asarray(row.token_ids, dtype=np.int64)
        factor, before = np.float32(params.repetition_penalty), values[seen]
        values[seen] = np.where(before > 0, before / factor, before * factor)  # a token seen twice gets the same value twice
    if params.presence_penalty or params.frequency_penalty:
        written, counts = np.unique(np.asarray(row.token_ids[row.num_prompt_tokens :], dtype=np.int64), return_counts=True)
        values[written] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)


def _weights(values: Floats, temperature: float) -> tuple[Floats, Sums]:
    """Probabilities up to a factor, the likeliest token's is 1, and their sums. Native code is ten times as fast as numpy."""
    temperature = max(temperature, 1e-30)
    if (native := library.loaded()) is not None:
        return weigh(native, values, temperature)
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats = np.exp((values - values.max()) / np.float32(temperature))
    return weights, _sums(weights)


def _sums(weights: Floats) -> Sums:
    """Of each group."""
    sums: Sums = np.add.reduceat(weights, np.arange(0, len(weights), GROUP), dtype=np.float64)
    return sums


def _pick(weights: Floats, sums: Sums, random: float) -> int:
    """The first index at which the running sum exceeds random * total: inverts the distribution, in the order given."""
    running = sums.cumsum()
    target = random * running[-1]
    group = min(int(np.searchsorted(running, target, side="right")), len(sums) - 1)
    before = running[group - 1] if group else 0.0
    start = group * GROUP
    within = before + weights[start : start + GROUP].cumsum(dtype=np.float64)
    index = start + int(np.searchsorted(within, target, side="right"))
    return index if index < len(weights) and weights[index] > 0 else int(np.flatnonzero(weights[: index + 1])[-1])


def _filter(weights: Floats, total: float, params: SamplingParams) -> Ids:
    """The tokens that may be drawn, ascending: top_k of all, of those the top_p nucleus, of those the ones that pass min_p.

    `total`: of all weights.
    """
    kept = _top_k(weights, params.top_k) if 0 < params.top_k < len(weights) else None
    if params.top_p < 1.0:
        kept = _top_p(weights, kept, total, params.top_p)
    if kept is None:
        kept = np.arange(len(weights))
    if params.min_p > 0.0:
        kept = kept[weights[kept] >= np.float32(params.min_p) * weights[kept].max()]
    return kept


def _top_k(weights: Floats, count: int) -> Ids:
    """The `count` likeliest, ascending by id; among equals the lower ids."""
    boundary = np.partition(weights, len(weights) - count)[len(weights) - count]
    above = np.flatnonzero(weights > boundary)
    equal = np.flatnonzero(weights == boundary)[: count - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _top_p(weights: Floats, kept: Ids | None, total: float, top_p: float) -> Ids:
    """The shortest run of the likeliest tokens whose share of the total, or of those kept, reaches top_p, ascending by id."""
    among = weights if kept is None else weights[kept]
    total = total if kept is None else float(among.sum(dtype=np.float64))
    # Tokens below this together have less than half of what may be left out, so none of them is in the run.
    likely = np.flatnonzero(among >= np.float32(0.5 * (1.0 - top_p) * total / len(among)))
    likely = likely if kept is None else kept[likely]
    for count in _CANDIDATES:
        if count < len(likely):
            candidates = likely[_top_k(weights[likely], count)]
            if float(weights[candidates].sum(dtype=np.float64)) >= top_p * total:
                return _nucleus(weights, candidates, top_p * total)
    return _nucleus(weights, likely, top_p * total)


def _nucleus(weights: Floats, candidates: Ids, mass: float) -> Ids:
    ordered = candidates[np.argsort(-weights[candidates], kind="stable")]
    running = weights[ordered].cumsum(dtype=np.float64)
    return np.sort(ordered[: int(np.searchsorted(running, mass, side="left")) + 1])


def _with_logprobs(raw: Floats, token: int, count: int) -> SampledToken:
    highest = raw.max()
    normalizer = float(highest) + float(np.log(np.exp(raw - highest).sum(dtype=np.float64)))
    if not count:
        return SampledToken(token, float(raw[token]) - normalizer)
    likeliest = _top_k(raw, min(count, len(raw)))
    ordered = likeliest[np.argsort(-raw[likeliest], kind="stable")]
    top = tuple((int(index), float(raw[index]) - normalizer) for index in ordered)
    return SampledToken(token, float(raw[token]) - normalizer, top)

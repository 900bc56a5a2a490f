"""Drawing tokens, against a float64 reference written another way."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm import sampling
from llm.ops.cpu.native import library
from llm.sampling import SampleRow, sample, token_logprobs, uniform
from llm.sampling_params import SamplingParams
from tandem.models import cache_directory

SETS = library.supported_sets() if library.compiler() is not None else ()


@pytest.fixture(scope="module", params=["numpy", *SETS[-1:]], autouse=True)
def weights_made_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test draws by weights of numpy, and of the native library."""
    native = None if request.param == "numpy" else library.load(cache_directory(), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "loaded", lambda: native)
        yield request.param


@pytest.mark.parametrize("name", ["as drawn", *SETS])
@pytest.mark.parametrize("size", [1, 7, 8, 255, 256, 257, 1000, 49_152])
@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 100.0])
def test_weights_and_their_sums(monkeypatch: pytest.MonkeyPatch, name: str, size: int, temperature: float) -> None:
    if name != "as drawn":
        native = library.load(cache_directory(), name)
        monkeypatch.setattr(library, "loaded", lambda: native)
    values = np.random.default_rng(size).normal(0, 9, size).astype(np.float32)
    values[size // 2 :: 3] = -np.inf
    values[size // 3] = 99.0
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp((values.astype(np.float64) - 99.0) / temperature)
    weights, sums = sampling._weights(values, temperature)
    assert np.allclose(weights, expected, rtol=2e-5, atol=1e-37)
    assert not weights[np.isneginf(values)].any(), "what is forbidden is never drawn"
    assert weights[size // 3] == 1.0
    assert np.allclose(sums, [weights[first : first + 256].sum(dtype=np.float64) for first in range(0, size, 256)], rtol=1e-12)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    seed=st.integers(0, 2**64 - 1),
)
sizes = st.sampled_from([1, 2, 7, 255, 256, 257, 1000])


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, SampleRow]:
    size, seed = draw(sizes), draw(st.integers(0, 1000))
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * draw(st.sampled_from([0.0, 0.1, 3.0, 50.0]))
    tokens = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    forbidden = draw(st.lists(st.integers(0, size - 1), max_size=min(3, size - 1)))
    return logits, SampleRow(draw(params), tokens, draw(st.integers(0, len(tokens))), forbidden)


def probabilities(logits: torch.Tensor, row: SampleRow) -> np.ndarray:
    """The distribution that is drawn from, in float64, token by token; all weight on the likeliest if greedy."""
    rules, values = row.params, logits.double().numpy().copy()
    for token in set(row.token_ids):
        values[token] = values[token] / rules.repetition_penalty if values[token] > 0 else values[token] * rules.repetition_penalty
    for token in row.token_ids[row.num_prompt_tokens :]:
        values[token] -= rules.frequency_penalty
    for token in set(row.token_ids[row.num_prompt_tokens :]):
        values[token] -= rules.presence_penalty
    values[list(row.forbidden_token_ids)] = -math.inf
    if rules.is_greedy:
        return (np.arange(len(values)) == values.argmax()).astype(float)
    weights = np.exp((values - values.max()) / rules.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: rules.top_k or len(order)]
    running = weights[kept].cumsum() / weights[kept].sum()
    if rules.top_p < 1:
        kept = kept[: np.searchsorted(running, rules.top_p) + 1]
    kept = kept[weights[kept] >= rules.min_p * weights.max() * (1 - 1e-9)]
    result = np.zeros(len(values))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@settings(deadline=None, max_examples=300)
@given(cases())
def test_draws_from_the_reference_distribution(case: tuple[torch.Tensor, SampleRow]) -> None:
    logits, row = case
    token = sample(logits[None], [row])[0].token_id
    expected = probabilities(logits, row)
    cumulative = np.concatenate(([0.0], expected.cumsum()))
    at = uniform(row.params.seed, len(row.token_ids))
    inverted = int(np.searchsorted(cumulative, at, side="right")) - 1
    near_an_edge = abs(cumulative - at).min() < 1e-4
    penalised_tie = np.sort(expected)[-1] - np.sort(expected)[-2:][0] < 1e-4
    assert token == inverted or near_an_edge or row.params.is_greedy or penalised_tie or row.params.top_p < 1
    assert 0 <= token < len(logits)
    assert token not in row.forbidden_token_ids


@settings(deadline=None, max_examples=200)
@given(cases())
def test_greedy_takes_the_likeliest(case: tuple[torch.Tensor, SampleRow]) -> None:
    logits, row = case
    greedy = SampleRow(SamplingParams(temperature=0.0), row.token_ids, row.num_prompt_tokens, row.forbidden_token_ids)
    assert probabilities(logits, greedy)[sample(logits[None], [greedy])[0].token_id] == 1.0


@settings(deadline=None, max_examples=100)
@given(st.lists(cases(), min_size=2, max_size=5))
def test_a_row_does_not_depend_on_the_others(given_cases: list[tuple[torch.Tensor, SampleRow]]) -> None:
    size = min(len(logits) for logits, _ in given_cases)
    rows = [
        SampleRow(row.params, [token % size for token in row.token_ids], row.num_prompt_tokens, (), 3) for _, row in given_cases
    ]
    logits = torch.stack([logits[:size] for logits, _ in given_cases])
    before = logits.clone()
    together = sample(logits, rows)
    assert together == [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_filters_keep_what_they_say(case: tuple[torch.Tensor, SampleRow]) -> None:
    logits, row = case
    rules = row.params
    plain = SampleRow(SamplingParams(1.0, rules.top_k, rules.top_p, rules.min_p, seed=rules.seed), row.token_ids, 0)
    weights = logits.double().softmax(-1).numpy()
    token = sample(logits[None], [plain])[0].token_id
    more_likely = weights > weights[token]
    assert rules.top_k == 0 or more_likely.sum() < rules.top_k
    assert weights[more_likely].sum() <= rules.top_p + 1e-5 or rules.top_k > 0
    assert weights[token] >= rules.min_p * weights.max() * (1 - 1e-5)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_frequencies_follow_the_probabilities(filters: dict[str, Any]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])
    rows = [SampleRow(SamplingParams(temperature=1.3, seed=seed, **filters), [0] * 5, 5) for seed in range(20_000)]
    drawn = np.bincount([token.token_id for token in sample(logits.expand(len(rows), -1), rows)], minlength=6) / len(rows)
    assert abs(drawn - probabilities(logits, rows[0])).max() < 0.012


def test_uniform_is_spread_evenly() -> None:
    values = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(np.histogram(values, 10)[0] - 1000).max() < 150
    assert len(np.unique(values)) == len(values)
    assert uniform(2**64 - 1, 0) != uniform(0, 0)


def test_position_is_the_length_of_the_history() -> None:
    logits = torch.zeros(1, 1000)
    rows = [SampleRow(SamplingParams(seed=1), [0] * length, 1) for length in range(1, 30)]
    assert len({sample(logits, [row])[0].token_id for row in rows}) > 20


def test_top_p_needs_more_than_its_first_candidates() -> None:
    logits = torch.zeros(1, 20_000)
    drawn = {sample(logits, [SampleRow(SamplingParams(top_p=0.9, seed=seed), [0], 1)])[0].token_id for seed in range(200)}
    assert max(drawn) < 18_000
    assert max(drawn) > 10_000


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    row = SampleRow(SamplingParams(temperature=0.0, repetition_penalty=5.0), [1, 3], 1, (2,), num_logprobs=3)
    token = sample(logits, [row])[0]
    expected = logits[0].double().log_softmax(-1)
    assert token.token_id == 0
    assert token.logprob == pytest.approx(float(expected[0]), abs=1e-6)
    assert [index for index, _ in token.top] == [1, 3, 2]
    assert [value for _, value in token.top] == pytest.approx([float(expected[index]) for index in (1, 3, 2)], abs=1e-6)


def test_logprobs_only_if_asked() -> None:
    logits = torch.randn(2, 10)
    quiet, zero = sample(logits, [SampleRow(SamplingParams(), [1], 1), SampleRow(SamplingParams(), [1], 1, (), 0)])
    assert (quiet.logprob, quiet.top) == (None, ())
    assert zero.logprob is not None
    assert zero.top == ()


def test_prompt_logprobs() -> None:
    logits = torch.randn(3, 50)
    tokens = token_logprobs(logits, [4, 0, 49], 2)
    assert [token.token_id for token in tokens] == [4, 0, 49]
    for row, token in zip(logits.double().log_softmax(-1), tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-6)
        assert [index for index, _ in token.top] == row.topk(2).indices.tolist()


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
@pytest.mark.parametrize("kept", [None, 700])
def test_top_p_keeps_what_sorting_all_would(top_p: float, spread: float, kept: int | None) -> None:
    weights = np.exp(spread * np.random.default_rng(1).standard_normal(20_000).astype(np.float32).round(2))
    weights /= weights.max()
    allowed = np.arange(len(weights)) if kept is None else np.arange(0, len(weights), len(weights) // kept)
    ordered = allowed[np.argsort(-weights[allowed], kind="stable")]
    running = weights[ordered].cumsum(dtype=np.float64)
    mass = top_p * weights[allowed].sum(dtype=np.float64)
    expected = np.sort(ordered[: int(np.searchsorted(running, mass)) + 1])
    total = float(weights.sum(dtype=np.float64))
    assert np.array_equal(sampling._top_p(weights, None if kept is None else allowed, total, top_p), expected)

"""Tokens drawn on the device against those that the host draws."""

import pytest
import torch

from llm.sampling import SampleRow, sample, uniform
from llm.sampling_params import SamplingParams

argmax = pytest.importorskip("llm.ops.gpu.argmax")
draw = pytest.importorskip("llm.ops.gpu.draw")
step = pytest.importorskip("llm.gpu.step")

PARAMETERS = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, seed=2),
    SamplingParams(top_k=5, seed=3),
    SamplingParams(top_k=1, seed=4),
    SamplingParams(top_p=0.8, seed=5),
    SamplingParams(top_p=0.05, temperature=1.5, seed=6),
    SamplingParams(min_p=0.2, seed=7),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.05, temperature=0.6, seed=8),
]


@pytest.mark.parametrize("width", [5, 4096, 5000])
def test_argmax_takes_the_lowest_of_equals(device, width):
    logits = torch.randn(4, width, device=device)
    logits[1, width // 2 :] = 9.0
    logits[2] = -torch.rand(width, device=device)
    logits[3] = -torch.inf
    logits[3, width - 1] = -1e30
    likeliest = argmax.Argmax(4, width, device)
    for _ in range(2):
        out = torch.full((4,), -1, dtype=torch.int32, device=device)
        likeliest(logits, out)
        assert out.tolist() == logits.cpu().numpy().argmax(axis=1).tolist()


def parameters_of(rows, device):
    def column(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    return draw.DrawParameters(
        column([row.params.temperature for row in rows], torch.float32),
        column([row.params.top_k for row in rows], torch.int32),
        column([row.params.top_p for row in rows], torch.float64),
        column([row.params.min_p for row in rows], torch.float32),
        column([uniform(row.params.seed, len(row.token_ids)) for row in rows], torch.float64),
    )


@pytest.mark.parametrize("width", [37, 5000])
def test_draws_what_the_host_draws(device, width):
    rows = [SampleRow(params, [1] * position, 1) for params, position in zip(PARAMETERS, (3, 9, 4, 5, 1, 2, 8, 7), strict=True)]
    rows = rows if width < 100 else rows[-2:]
    logits = 3 * torch.randn(len(rows), width, device=device)
    out = torch.full((len(rows),), -1, dtype=torch.int32, device=device)
    draw.draw(logits, parameters_of(rows, device), out)
    assert out.tolist() == [token.token_id for token in sample(logits.cpu(), rows)]


def test_equal_weights_are_kept_by_lowest_id(device):
    rows = [SampleRow(SamplingParams(top_k=3, seed=seed), [1], 1) for seed in range(6)]
    logits = torch.zeros(6, 50, device=device)
    out = torch.full((6,), -1, dtype=torch.int32, device=device)
    draw.draw(logits, parameters_of(rows, device), out)
    assert out.tolist() == [token.token_id for token in sample(logits.cpu(), rows)]
    assert set(out.tolist()) <= {0, 1, 2}


def drawn_by(logits, rows):
    out = torch.full((len(rows),), -1, dtype=torch.int32, device=logits.device)
    draw.draw(logits, parameters_of(rows, logits.device), out)
    return out.tolist()


FILTERS = [SamplingParams(top_k=60, seed=1), SamplingParams(top_p=0.97, seed=2), SamplingParams(top_k=3000, top_p=0.5, seed=3)]


@pytest.mark.parametrize("spread", [0.02, 3.0, 80.0])
def test_draws_what_the_host_draws_from_flat_and_steep_rows_of_many_parts(device, spread):
    """Steep rows have their thresholds among the tiniest weights, flat ones all weights in one digit."""
    logits = spread * torch.randn(len(FILTERS), 9000, device=device)
    rows = [SampleRow(params, [1], 1) for params in FILTERS]
    assert drawn_by(logits, rows) == [token.token_id for token in sample(logits.cpu(), rows)]


def test_equals_are_kept_by_lowest_id_over_parts(device):
    filters = [{"top_k": 4500}, {"top_p": 0.55}, {"top_k": 4097, "top_p": 0.999}]
    rows = [SampleRow(SamplingParams(**each, seed=seed), [1], 1) for each, seed in zip(filters, (4, 5, 6), strict=True)]
    logits = torch.zeros(3, 9000, device=device)
    assert drawn_by(logits, rows) == [token.token_id for token in sample(logits.cpu(), rows)]


def test_a_row_draws_the_same_whatever_its_neighbours(device):
    rows = [SampleRow(params, [1], 1) for params in PARAMETERS[-3:]]
    logits = 2 * torch.randn(len(rows), 5000, device=device)
    assert drawn_by(logits, rows) == [drawn_by(logits[[index]], [row])[0] for index, row in enumerate(rows)]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_row_without_numbers_draws_a_token_that_exists(device):
    logits = torch.full((2, 5000), torch.nan, device=device)
    logits[1, 4500] = torch.inf
    assert all(0 <= token < 5000 for token in drawn_by(logits, [SampleRow(PARAMETERS[-1], [1], 1)] * 2))


def test_greedy_rows_among_others_take_the_first_of_the_likeliest(device):
    rows = [SampleRow(params, [1] * 3, 1) for params in (SamplingParams(temperature=0.0, top_k=7, top_p=0.2), *PARAMETERS[1:3])]
    logits = torch.randn(3, 4500, device=device)
    logits[0, [4400, 77, 4098]] = logits[0].max() + 1
    drawn = torch.zeros(3, dtype=torch.int32, device=device)
    step.draw_rows(logits, rows, [3, 3, 3], drawn)
    assert drawn.tolist() == [token.token_id for token in sample(logits.cpu(), rows)]
    assert drawn[0] == 77

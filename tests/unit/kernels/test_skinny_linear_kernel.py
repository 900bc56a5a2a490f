"""Products with few rows, and what is folded into them."""

import pytest
import torch

from tests.fakes.paged_batches import relative_error

skinny = pytest.importorskip("llm.ops.gpu.skinny_linear")
whole_rows = pytest.importorskip("llm.ops.gpu.whole_rows")
Around, Tile = skinny.Around, skinny.Tile

FOLDED = ["plain", "norm", "bias", "residual", "silu_mul", "norm and silu_mul"]
LLAMA_8B = {"qkv": (4096, 6144), "output": (4096, 4096), "down": (14_336, 4096), "head": (4096, 128_256)}


def make_around(name, width, height, rows, device):
    return Around(
        norm=torch.randn(width, device=device) if "norm" in name else None,
        bias=torch.randn(height, device=device) if name == "bias" else None,
        residual=torch.randn(rows, height, device=device) if name == "residual" else None,
        silu_mul="silu_mul" in name,
    )


@pytest.mark.parametrize(("folded", "rows"), [(name, 1) for name in FOLDED] + [(name, 3) for name in ("plain", "bias", "silu_mul")])
@pytest.mark.parametrize(("width", "height"), [(200, 70), (96, 40), (64, 32)])
def test_is_the_reference(device, folded, rows, width, height):
    x, weight = torch.randn(rows, width, device=device), torch.randn(height, width, device=device)
    around = make_around(folded, width, height, rows, device)
    expected = skinny.skinny_linear_reference(x, weight, around)
    out = skinny.skinny_linear(x, weight, around, Tile(16, 64))
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 1e-5
    assert (out is around.residual) == (folded == "residual")


@pytest.mark.parametrize("folded", ["plain", "norm", "bias", "residual"])
@pytest.mark.parametrize(("width", "height"), [(200, 23), (64, 8)])
def test_whole_rows_are_the_reference(device, monkeypatch, folded, width, height):
    """Three programs take more than one round each, the last of which is not full."""
    monkeypatch.setattr(whole_rows, "MULTIPROCESSORS", 3)
    x, weight = torch.randn(1, width, device=device), torch.randn(height, width, device=device)
    around = make_around(folded, width, height, 1, device)
    expected = skinny.skinny_linear_reference(x, weight, around)
    out = torch.full((1, height), torch.nan, device=device) if around.residual is None else around.residual
    whole_rows.take_whole_rows(x, weight, around, whole_rows.WholeRows(2, 4, 3, 1), out)
    assert relative_error(out, expected) < 1e-5


def test_whole_rows_are_taken_where_they_fit():
    chosen = {use: whole_rows.choose_whole_rows(*shape, 2) for use, shape in LLAMA_8B.items()}
    assert chosen["qkv"] == chosen["output"] == whole_rows.WholeRows(2, 8, 4, 4)
    assert chosen["down"] == whole_rows.WholeRows(2, 16, 3, 1)
    assert chosen["head"] is None
    assert whole_rows.choose_whole_rows(576, 960, 2) is None, "too little in flight"
    assert whole_rows.choose_whole_rows(14_336, 4096, 4) is None, "more than the shared memory"


@pytest.mark.parametrize(("width", "height"), [(2048, 5), (4096, 3)])
def test_one_row_of_a_wide_product(device, width, height):
    """Both choices of whole rows, in float32."""
    x, weight = torch.randn(1, width, device=device), torch.randn(height, width, device=device)
    assert whole_rows.choose_whole_rows(width, height, 4) is not None
    assert relative_error(skinny.skinny_linear(x, weight), x.double() @ weight.double().T) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "splits"), [((2, 96, 40), 2), ((3, 200, 70), 3), ((17, 64, 32), 8), ((5, 64, 33), 1)])
def test_parts_add_up(device, dtype, shape, splits):
    """Also where the inputs do not divide evenly, and where some parts have none."""
    rows, width, height = shape
    x, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(height, width, device=device).to(dtype)
    parts = skinny.linear_parts(x, weight, splits, Tile(16, 32))
    assert parts.shape == (splits, rows, height)
    assert parts.dtype == torch.float32
    assert relative_error(parts.sum(dim=0), x.double() @ weight.double().T) < 1e-5


@pytest.mark.parametrize(("height", "splits"), [(4096, 2), (2048, 4), (576, 4), (8192, 1), (128_256, 1)])
def test_inputs_are_shared_where_multiprocessors_would_be_idle(height, splits):
    assert skinny.choose_splits(height, skinny.choose_tile(16, 4096, height)) == splits


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_half_precision_and_wide_results(device, rows):
    x, weight = torch.randn(rows, 128, device=device).half(), torch.randn(48, 128, device=device).half()
    out = skinny.skinny_linear(x, weight, Around(float32=True))
    assert out.dtype == torch.float32
    assert relative_error(out, x.double() @ weight.double().T) < 1e-3


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("use", LLAMA_8B)
def test_every_choice_of_tile_runs(device, rows, use):
    tile = skinny.choose_tile(rows, *LLAMA_8B[use])
    x, weight = torch.randn(rows, 300, device=device), torch.randn(100, 300, device=device)
    expected = x.double() @ weight.double().T
    assert relative_error(skinny.skinny_linear(x, weight, tile=tile), expected) < 1e-5
    assert relative_error(skinny.linear_parts(x, weight, tile=tile).sum(dim=0), expected) < 1e-5

"""Products with few rows, and what is folded into them."""

import pytest
import torch

from tests.fakes.paged_batches import relative_error

skinny = pytest.importorskip("llm.ops.gpu.skinny_linear")
few_rows = pytest.importorskip("llm.gpu.few_rows")
Around, Tile = skinny.Around, skinny.Tile

FOLDED = ["plain", "norm", "bias", "residual", "silu_mul", "norm and silu_mul"]


def make_around(name, width, height, rows, device):
    return Around(
        norm=torch.randn(width, device=device) if "norm" in name else None,
        bias=torch.randn(height, device=device) if name == "bias" else None,
        residual=torch.randn(rows, height, device=device) if name == "residual" else None,
        silu_mul="silu_mul" in name,
    )


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize(("rows", "width", "height"), [(1, 200, 70), (3, 96, 40), (17, 64, 32)])
def test_is_the_reference(device, folded, rows, width, height):
    x, weight = torch.randn(rows, width, device=device), torch.randn(height, width, device=device)
    around = make_around(folded, width, height, rows, device)
    expected = skinny.skinny_linear_reference(x, weight, around)
    out = skinny.skinny_linear(x, weight, around, Tile(16, 64))
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 1e-5
    assert (out is around.residual) == (folded == "residual")


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_half_precision_and_wide_results(device, rows):
    x, weight = torch.randn(rows, 128, device=device).half(), torch.randn(48, 128, device=device).half()
    out = skinny.skinny_linear(x, weight, Around(float32=True))
    assert out.dtype == torch.float32
    assert relative_error(out, x.double() @ weight.double().T) < 1e-3


@pytest.mark.parametrize(("rows", "width", "height"), [(1, 4096, 4096), (1, 14_336, 4096), (8, 4096, 4096), (8, 4096, 128_256)])
def test_every_choice_of_tile_runs(device, rows, width, height):
    tile = skinny.choose_tile(rows, width, height)
    x, weight = torch.randn(rows, 64, device=device), torch.randn(100, 64, device=device)
    assert relative_error(skinny.skinny_linear(x, weight, tile=tile), x.double() @ weight.double().T) < 1e-5


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("around", ["norm and bias", "residual", "norm and silu", "float32"])
def test_products_of_a_few_rows_whoever_computes_them(device, rows, around):
    """Beyond SKINNY_ROWS the library takes some of them."""
    x, weight = torch.randn(rows, 64, device=device), torch.randn(48, 64, device=device)
    norm, bias, residual = torch.rand(64, device=device), torch.randn(48, device=device), torch.randn(rows, 48, device=device)
    given = {
        "norm and bias": Around(norm=norm, bias=bias),
        "residual": Around(residual=residual.clone()),
        "norm and silu": Around(norm=norm, silu_mul=True),
        "float32": Around(norm=norm, float32=True),
    }[around]
    expected = skinny.skinny_linear_reference(x, weight, given)
    out = few_rows.product(x, weight, given)
    assert relative_error(out, expected) < 1e-5
    assert given.residual is None or out is given.residual

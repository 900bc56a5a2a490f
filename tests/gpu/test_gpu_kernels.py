"""Every kernel in bfloat16 at the shapes of real models, against references in higher precision on fresh random inputs."""

import pytest
import torch

from llm.ops import rms_norm as norm_reference
from llm.ops import silu_mul as silu_reference
from llm.ops.attention import paged_attention as attention_reference
from llm.ops.rope import make_rotation
from tests.fakes.paged_batches import Heads, make_paged, relative_error

skinny = pytest.importorskip("llm.ops.gpu.skinny_linear")
chunks = pytest.importorskip("prefill_svc.kernels.chunk_attention")
paged = pytest.importorskip("decode_svc.kernels.paged_attention")
norms = pytest.importorskip("llm.ops.gpu.rms_norm")
silu = pytest.importorskip("llm.ops.gpu.silu_mul")
rope = pytest.importorskip("llm.ops.gpu.rope")

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-2
"""Relative; between 1e-3 and 1e-2 is what bfloat16 operands give."""
SHAPES = [Heads(32, 8, 128), Heads(32, 8, 64), Heads(10, 2, 80), Heads(16, 4, 96, 32), Heads(14, 2, 64), Heads(8, 8, 128)]
PACKED = [(1024, 1024), (77, 500), (1, 333), (300, 1300), (129, 129), (5, 2048)]


def attended(attention, lengths, heads, device):
    case = make_paged(lengths, heads, attention.tile_tokens, device, torch.bfloat16)
    poison = torch.full((len(case.batch.positions), heads.query * heads.dim), torch.nan, dtype=torch.bfloat16, device=device)
    del poison  # the output is likely to be given this memory
    out = attention(case.qkv, case.tiles, case.pool, 1)
    return relative_error(out, attention_reference(case.qkv.float(), case.batch, case.pool.float(), 1))


@pytest.mark.parametrize("shape", [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)], ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prefill_attention(device, heads, shape):
    assert attended(chunks.ChunkAttention(chunks.Shape(*shape)), PACKED, heads, device) < TOLERANCE


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("new", [1, 2, 5, 16])
def test_decode_attention(device, heads, new):
    attention = paged.PagedAttention()
    for lengths in ([(new, 4096)], [(new, 16 + 131 * index % 2500) for index in range(40)], [(new, 700)] * 3):
        assert attended(attention, lengths, heads, device) < TOLERANCE


def table_of(frequencies, positions):
    rotation = make_rotation(frequencies, positions)
    return rope.Angles(rotation.cos, rotation.sin)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_the_next_token_is_turned_written_and_attended_at_once(device, heads):
    """Rotated and written as the launch of its own does it; the attention against the reference."""
    attention, frequencies = paged.PagedAttention(), torch.rand(heads.dim // 2, device=device)
    for lengths in ([4096], [1, 2, 16, 17, 64, 65, 1025], [16 + 131 * index % 2500 for index in range(40)], [700] * 64):
        case = make_paged([(1, total) for total in lengths], heads, 16, device, torch.bfloat16)
        positions, blocks, offsets = (
            torch.from_numpy(array).to(device) for array in (case.batch.positions, case.batch.row_blocks, case.batch.row_offsets)
        )
        case.pool[blocks.long(), :, :, :, offsets.long()] = torch.nan
        qkv, pool = case.qkv.clone(), case.pool.clone()
        rope.rotate_and_write(qkv, table_of(frequencies, positions), rope.KvPlaces(blocks, offsets), pool, 1)
        expected = attention_reference(qkv.float(), case.batch, pool.float(), 1)
        table = table_of(frequencies, torch.arange(max(lengths), device=device))
        out = attention.turn_and_attend(case.qkv, table, case.tiles, case.pool, 1)
        assert relative_error(out, expected) < TOLERANCE
        assert torch.equal(case.pool.isnan(), pool.isnan())
        assert relative_error(case.pool.nan_to_num(), pool.nan_to_num()) < 1e-3


@pytest.mark.parametrize("at_once", [False, True])
def test_decode_attention_repeats_itself_exactly(device, at_once):
    """Whichever program ends last, the parts are added in one order; a difference would be a race."""
    attention = paged.PagedAttention()
    case = make_paged([(1, 5000), (1, 17), (1, 900)], Heads(32, 8, 128), 16, device, torch.bfloat16)
    table = table_of(torch.rand(64, device=device), torch.arange(5000, device=device))

    def attended_again():
        if at_once:
            return attention.turn_and_attend(case.qkv, table, case.tiles, case.pool, 0)
        return attention(case.qkv, case.tiles, case.pool, 0)

    first = attended_again()
    for _ in range(200):
        assert torch.equal(attended_again(), first)


SKINNY = [(1, "norm"), (1, "residual"), (1, "norm and silu_mul")] + [
    (rows, folded) for rows in (1, 2, 3, 8, 16, 24, 33, 64) for folded in ("plain", "bias", "silu_mul", "float32")
]


@pytest.mark.parametrize(("rows", "folded"), SKINNY)
@pytest.mark.parametrize(("width", "height"), [(4096, 6144), (14336, 4096), (576, 960), (4096, 128_256)])
def test_skinny_linear(device, rows, width, height, folded):
    x, weight = torch.randn(rows, width, device=device).bfloat16(), torch.randn(height, width, device=device).bfloat16() / 64
    around = skinny.Around(
        norm=torch.rand(width, device=device) if "norm" in folded else None,
        bias=torch.rand(height, device=device).bfloat16() if folded == "bias" else None,
        residual=torch.randn(rows, height, device=device).bfloat16() if folded == "residual" else None,
        silu_mul="silu_mul" in folded,
        float32=folded == "float32",
    )
    expected = skinny.skinny_linear_reference(x, weight, around)
    assert relative_error(skinny.skinny_linear(x, weight, around), expected) < TOLERANCE


@pytest.mark.parametrize("rows", [2, 16, 24, 33, 64])
@pytest.mark.parametrize(("width", "height"), [(4096, 4096), (14336, 4096), (576, 960), (4864, 896)])
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_parts_of_a_product(device, rows, width, height, splits):
    x, weight = torch.randn(rows, width, device=device).bfloat16(), torch.randn(height, width, device=device).bfloat16() / 64
    parts = skinny.linear_parts(x, weight, splits)
    assert relative_error(parts.sum(dim=0), skinny.skinny_linear_reference(x, weight, skinny.Around())) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_products_in_float32(device, rows):
    """Fit the shared memory too."""
    x, weight = torch.randn(rows, 4096, device=device), torch.randn(6144, 4096, device=device) / 64
    for around in (skinny.Around(), skinny.Around(silu_mul=True)):
        assert relative_error(skinny.skinny_linear(x, weight, around), skinny.skinny_linear_reference(x, weight, around)) < 1e-4
    assert relative_error(skinny.linear_parts(x, weight).sum(dim=0), x.double() @ weight.double().T) < 1e-4


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (513, 4096), (8, 8192), (3, 576)])
def test_elementwise(device, rows, width):
    x, delta, weight = (torch.randn(*shape, device=device) for shape in ((rows, width), (rows, width), (width,)))
    x, delta = x.bfloat16(), delta.bfloat16()
    total = (x.float() + delta.float()).bfloat16()
    assert relative_error(norms.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x.double(), weight.double(), 1e-5)) < 5e-3
    out = norms.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(x, total)
    assert relative_error(out, norm_reference.rms_norm(total.double(), weight.double(), 1e-5)) < 5e-3
    parts = torch.randn(4, rows, width, device=device)
    total = x.double() + parts.double().sum(dim=0)
    out = norms.add_rms_norm(x, parts, weight, 1e-5)
    assert relative_error(x, total) < 5e-3
    assert relative_error(out, norm_reference.rms_norm(total, weight.double(), 1e-5)) < 5e-3
    gate_up = torch.randn(rows, 2 * width, device=device).bfloat16()
    assert relative_error(silu.silu_mul(gate_up), silu_reference.silu_mul(gate_up.double())) < 5e-3

"""RMSNorm, SiLU and the embedding against their torch references."""

import pytest
import torch

from llm.ops import rms_norm as norm_reference
from llm.ops import silu_mul as silu_reference
from tests.fakes.paged_batches import relative_error

norms = pytest.importorskip("llm.ops.gpu.rms_norm")
silu = pytest.importorskip("llm.ops.gpu.silu_mul")
embedding = pytest.importorskip("llm.ops.gpu.embed")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 576), (3, 1000)])
def test_rms_norm_is_the_reference(device, dtype, rows, width):
    x, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, device=device)
    out = norms.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert relative_error(out, norm_reference.rms_norm(x.double(), weight.double(), 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 300)])
def test_add_rms_norm_adds_in_place(device, rows, width):
    x, delta, weight = (torch.randn(*shape, device=device) for shape in ((rows, width), (rows, width), (width,)))
    expected_x = x.double() + delta.double()
    out = norms.add_rms_norm(x, delta, weight, 1e-6)
    assert relative_error(x, expected_x) < 1e-6
    assert relative_error(out, norm_reference.rms_norm(expected_x, weight.double(), 1e-6)) < 1e-5


@pytest.mark.parametrize("splits", [1, 3])
def test_add_rms_norm_adds_all_parts(device, splits):
    x, parts, weight = (torch.randn(*shape, device=device) for shape in ((4, 300), (splits, 4, 300), (300,)))
    expected_x = x.double() + parts.double().sum(dim=0)
    out = norms.add_rms_norm(x, parts, weight, 1e-6)
    assert relative_error(x, expected_x) < 1e-6
    assert relative_error(out, norm_reference.rms_norm(expected_x, weight.double(), 1e-6)) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 80)])
def test_head_norm_leaves_values_alone(device, heads, kv_heads, head_dim):
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim, device=device)
    query_norm, key_norm = torch.randn(head_dim, device=device), torch.randn(head_dim, device=device)
    expected = qkv.clone()
    norm_reference.head_norm(expected, query_norm, key_norm, 1e-5, kv_heads)
    norms.head_norm(qkv, query_norm, key_norm, 1e-5, kv_heads)
    assert relative_error(qkv, expected) < 1e-5
    values = kv_heads * head_dim
    assert torch.equal(qkv[:, -values:], expected[:, -values:])


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 1536), (2, 2500)])
def test_silu_mul_is_the_reference(device, rows, width):
    gate_up = 4 * torch.randn(rows, 2 * width, device=device)
    assert relative_error(silu.silu_mul(gate_up), silu_reference.silu_mul(gate_up.double())) < 1e-5


def test_embedding_takes_drawn_tokens_where_asked(device):
    table = torch.randn(50, 72, device=device)
    ids = torch.tensor([3, 49, 7, 0], dtype=torch.int32, device=device)
    sources = torch.tensor([-1, 2, -1, 0], dtype=torch.int32, device=device)
    drawn = torch.tensor([11, 12, 13], dtype=torch.int32, device=device)
    out = embedding.embed(table, ids, sources, drawn)
    assert torch.equal(out, embedding.embed_reference(table, ids, sources, drawn))
    assert torch.equal(out, table[[3, 13, 7, 11]])

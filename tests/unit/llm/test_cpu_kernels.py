"""Each compiled kernel against its torch reference, with odd shapes and memory that was never written."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("numba")

from llm.batch import Batch, SequenceSlice, build_batch
from llm.ops.attention import paged_attention
from llm.ops.cpu.operations import CpuOperations
from llm.ops.cpu.threads import Threads
from llm.ops.linear import TorchLinear
from llm.ops.operations import TorchOperations
from llm.ops.rope import make_rotation

DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = TorchOperations()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=[1, 2])
def operations(request: pytest.FixtureRequest) -> CpuOperations:
    return CpuOperations(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-6) -> None:
    scale = expected.abs().max().clamp(min=1e-6)
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 5),
        (1, 960, 576),
        (2, 50, 64),
        (3, 1, 16),
        (4, 97, 33),
        (5, 49, 96),
        (17, 100, 64),
        (96, 51, 48),
        (97, 64, 48),
        (200, 33, 17),
    ],
)
def test_linear(operations: CpuOperations, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    rows, size, depth = shape
    weight, x = torch.randn(size, depth).to(dtype), torch.randn(rows, depth)
    added = torch.randn(size) if bias else None
    product = operations.linear(weight, added)
    operations.linear(torch.full((size, depth), float("nan")))(x)
    close(product(x), TorchLinear(weight, added)(x))


def test_lasting_results_are_not_reused(operations: CpuOperations) -> None:
    product = operations.linear(torch.randn(8, 8), lasting=True)
    x = torch.randn(1, 8)
    first = product(x)
    kept = first.clone()
    product(2 * x)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 17), (40, 576), (700, 64)])
def test_norms(operations: CpuOperations, rows: int, size: int) -> None:
    x, delta, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    close(operations.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    mine, theirs = x.clone(), x.clone()
    close(operations.add_rms_norm(mine, delta, weight, 1e-5), REFERENCE.add_rms_norm(theirs, delta, weight, 1e-5))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (3, 5), (40, 1536)])
def test_silu_mul(operations: CpuOperations, rows: int, size: int) -> None:
    values = 40 * torch.randn(rows, 2 * size)
    values[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    close(operations.silu_mul(values), REFERENCE.silu_mul(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(operations: CpuOperations, dtype: torch.dtype) -> None:
    table = torch.randn(50, 24).to(dtype)
    batch = build_batch([SequenceSlice([3, 49, 0, 3], 0, [0])], 16)
    assert torch.equal(operations.embed(table, batch), REFERENCE.embed(table, batch))


def make_batch(lengths: Sequence[tuple[int, int]], block_tokens: int, num_blocks: int) -> Batch:
    """(start, new tokens) of each sequence, over scattered blocks."""
    order = torch.randperm(num_blocks).tolist()
    slices = []
    for start, count in lengths:
        need = -(-(start + count) // block_tokens)
        slices.append(SequenceSlice([1] * count, start, [order.pop() for _ in range(need)]))
    return build_batch(slices, block_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 1, 16), (2, 2, 80), (8, 2, 128), (3, 3, 10)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_rotate_and_write(operations: CpuOperations, shape: tuple[int, int, int], dtype: torch.dtype, tokens: int) -> None:
    heads, kv_heads, size = shape
    batch = make_batch([(37, tokens), (0, 3)], 16, 12)
    qkv = torch.randn(len(batch.positions), (heads + 2 * kv_heads) * size)
    rotation = make_rotation(torch.rand(size // 2), torch.from_numpy(batch.positions))
    pools = [torch.full((12, 2, 2, kv_heads, 16, size), 7.0, dtype=dtype) for _ in range(2)]
    mine, theirs = qkv.clone(), qkv.clone()
    operations.rotate_and_write(mine, rotation, batch, pools[0], 1)
    REFERENCE.rotate_and_write(theirs, rotation, batch, pools[1], 1)
    close(mine, theirs)
    assert torch.equal(pools[0][:, 0], pools[1][:, 0])
    close(pools[0].float(), pools[1].float(), 1e-6 if dtype == torch.float32 else 8e-3)


def test_writing_rounds_to_nearest_even(operations: CpuOperations) -> None:
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.1415927, 1e-40, 65504.0, 0.0, -0.0]).repeat(2)
    qkv = torch.cat((torch.zeros(16), torch.zeros(16), values))[None].contiguous()
    pool = torch.zeros(1, 1, 2, 1, 16, 16, dtype=torch.bfloat16)
    rotation = make_rotation(torch.zeros(8), torch.zeros(1))
    operations.rotate_and_write(qkv, rotation, build_batch([SequenceSlice([0], 0, [0])], 16), pool, 0)
    assert torch.equal(pool[0, 0, 1, 0, 0], values.to(torch.bfloat16))


HEADS = [(9, 3, 64), (4, 4, 16), (4, 1, 80), (8, 2, 96), (7, 1, 128), (2, 1, 32)]
LENGTHS = [
    [(0, 1)],
    [(15, 1), (16, 1), (0, 1), (700, 1)],
    [(511, 1), (512, 1), (1200, 1)],
    [(0, 5), (3, 2), (31, 1), (100, 33)],
    [(0, 70), (257, 64)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("shape", HEADS)
def test_attention(
    operations: CpuOperations, shape: tuple[int, int, int], dtype: torch.dtype, lengths: list[tuple[int, int]]
) -> None:
    heads, kv_heads, size = shape
    batch = make_batch(lengths, 16, 160)
    pool = torch.full((160, 2, 2, kv_heads, 16, size), float("nan"), dtype=dtype)
    for sequence, length in enumerate(batch.lengths):
        for index, block in enumerate(batch.blocks(sequence)):
            used = min(16, int(length) - 16 * index)
            pool[int(block), 1, :, :, :used] = torch.randn(2, kv_heads, used, size).to(dtype)
    qkv = torch.randn(len(batch.positions), (heads + 2 * kv_heads) * size)
    operations.attention(qkv, batch, torch.nan_to_num(pool), 0)
    close(operations.attention(qkv, batch, pool, 1), paged_attention(qkv, batch, pool, 1), 1e-5)


@pytest.mark.parametrize("block_tokens", [4, 6, 8, 640])
def test_attention_over_other_blocks(operations: CpuOperations, block_tokens: int) -> None:
    batch = make_batch([(650, 1), (0, 9)], block_tokens, 200)
    pool, qkv = torch.randn(200, 1, 2, 1, block_tokens, 16), torch.randn(10, 64)
    close(operations.attention(qkv, batch, pool, 0), paged_attention(qkv, batch, pool, 0), 1e-5)


def test_attention_of_one_row_is_the_same_whatever_the_batch(operations: CpuOperations) -> None:
    pool, qkv = torch.randn(160, 1, 2, 3, 16, 64), torch.randn(4, 15 * 64)
    alone = build_batch([SequenceSlice([1], 700, list(range(50)))], 16)
    among = build_batch([SequenceSlice([1], start, list(range(50))) for start in (700, 3, 50, 600)], 16)
    expected = operations.attention(qkv[:1].contiguous(), alone, pool, 0).clone()
    assert torch.equal(operations.attention(qkv, among, pool, 0)[:1], expected)


def test_scores_far_apart_do_not_overflow(operations: CpuOperations) -> None:
    batch = build_batch([SequenceSlice([1], 40, [0, 1, 2])], 16)
    pool, qkv = 100 * torch.randn(3, 1, 2, 1, 16, 16), 100 * torch.randn(1, 48)
    close(operations.attention(qkv, batch, pool, 0), paged_attention(qkv, batch, pool, 0), 1e-4)


def test_a_crowded_machine_gets_steps_of_one_thread() -> None:
    threads = Threads(2)

    def count(num_rows: int) -> int:
        with threads.step(num_rows):
            return threads.count

    threads.observe(wall_s=0.1, own_s=0.02)
    threads.observe(wall_s=0.02, own_s=0.02)
    threads.observe(wall_s=0.1, own_s=0.02)
    assert (threads.count, count(500)) == (2, 2)
    threads.observe(wall_s=0.1, own_s=0.02)
    assert [count(1), count(500), count(16)] == [1, 2, 1]
    for _ in range(30):
        count(1)
    assert count(1) == 2


def test_one_thread_has_no_crowd() -> None:
    threads = Threads(1)
    for _ in range(5):
        threads.observe(wall_s=1.0, own_s=0.1)
    with threads.step(1):
        assert threads.count == 1

"""What bench.kernels times: each kernel at the shapes of Llama-3.1-8B, with the bytes or operations it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bench.gpu_timing import Call
from decode_svc.kernels.paged_attention import PagedAttention, Stretch
from llm.batch import Batch, Integers, SequenceSlice, build_batch
from llm.gpu.tiles import Tiles, cut_tiles, whole_rows
from llm.ops.gpu.argmax import Argmax
from llm.ops.gpu.block_copy import copy_blocks, copy_blocks_reference
from llm.ops.gpu.checksum import block_checksums
from llm.ops.gpu.draw import DrawParameters, draw
from llm.ops.gpu.rms_norm import add_rms_norm
from llm.ops.gpu.rope import Angles, KvPlaces, rotate_and_write
from llm.ops.gpu.silu_mul import silu_mul
from llm.ops.gpu.skinny_linear import Tile, linear_parts, skinny_linear
from llm.ops.gpu.whole_rows import Around
from prefill_svc.kernels.chunk_attention import ChunkAttention, Shape

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, PAGE = 4096, 14336, 128_256, 32, 8, 128, 16
MATRICES = {
    "qkv": (HIDDEN, 6144),
    "output": (HIDDEN, HIDDEN),
    "gate_up": (HIDDEN, 2 * FFN),
    "down": (FFN, HIDDEN),
    "head": (HIDDEN, VOCAB),
}
SKINNY_TILES = [
    Tile(16, 256), Tile(16, 512, 4, 3), Tile(32, 128), Tile(32, 256, 4, 3), Tile(32, 128, 4, 6), Tile(64, 64, 4, 5), Tile(64, 128),
    Tile(64, 128, 4, 5), Tile(64, 256, 4, 3), Tile(64, 64, 4, 8), Tile(128, 128, 8, 3), Tile(64, 128, 8, 4),
]  # fmt: skip
VECTOR_TILES = [
    Tile(8, 512, 4, 2), Tile(8, 512, 4, 4), Tile(8, 1024, 8, 2), Tile(4, 1024, 4, 3), Tile(4, 1024, 4, 2), Tile(4, 512, 4, 4),
    Tile(2, 2048, 4, 2), Tile(16, 256, 4, 3),
]  # fmt: skip
PREFILL_SHAPES = [Shape(128, 128, 8, 2), Shape(128, 64, 8, 3), Shape(128, 64, 8, 4), Shape(64, 64, 4, 3), Shape(128, 128, 8, 3)]
STRETCHES = [
    Stretch(), Stretch(32, 4, 4), Stretch(128, 4, 3), Stretch(64, 2, 2), Stretch(64, 2, 4), Stretch(64, 1, 3), Stretch(32, 1, 4),
    Stretch(32, 1, 6), Stretch(64, 2, 3, 512), Stretch(64, 2, 3, 128),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Calls over different memory, all of the same work."""

    name: str
    calls: Sequence[Call]
    num_bytes: float = 0.0
    num_flops: float = 0.0
    torch_calls: Sequence[Call] | None = None
    """What torch offers for the same, where it does."""


def all_cases(tunes: bool) -> Iterator[Case]:
    """Lazily, for some need gigabytes. With `tunes` every candidate shape is a case of its own."""
    yield from _elementwise()
    yield from _skinny(tunes)
    yield from _drawing()
    yield from _blocks()
    yield from _decode_attention(tunes)
    yield from _prefill_attention(tunes)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _copies(num_bytes: float) -> int:
    """Input sets that together are far larger than the L2 cache."""
    return max(1, min(8, int(400e6 / max(num_bytes, 1))))


def _elementwise() -> Iterator[Case]:
    for rows in (1, 64, 8192):
        weight, num_bytes = torch.rand(HIDDEN, device="cuda"), rows * HIDDEN * 8
        pairs = [(_random(rows, HIDDEN), _random(rows, HIDDEN)) for _ in range(_copies(num_bytes))]
        narrow = weight.bfloat16()
        plain = [partial(_torch_add_rms_norm, x, delta, narrow) for x, delta in pairs]
        yield Case(f"add_rms_norm {rows}", [partial(add_rms_norm, x, d, weight, 1e-5) for x, d in pairs], num_bytes, 0, plain)
        parts = [torch.randn(2, rows, HIDDEN, device="cuda") for _ in pairs] if rows == 64 else []
        if parts:
            calls = [partial(add_rms_norm, x, part, weight, 1e-5) for (x, _), part in zip(pairs, parts, strict=True)]
            yield Case(f"add_rms_norm {rows}, two parts", calls, rows * HIDDEN * 14)
        wide = [_random(rows, 2 * FFN) for _ in range(_copies(rows * FFN * 6))]
        yield Case(
            f"silu_mul {rows}", [partial(silu_mul, x) for x in wide], rows * FFN * 6, 0, [partial(_torch_silu, x) for x in wide]
        )
        yield _rope(rows)


def _torch_add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x += delta
    return torch.nn.functional.rms_norm(x, (HIDDEN,), weight, 1e-5)


def _torch_silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _rope(rows: int) -> Case:
    pool = _pool(-(-rows // PAGE), layers=2)
    blocks = torch.arange(rows, dtype=torch.int32, device="cuda")
    places = KvPlaces(blocks // PAGE, blocks % PAGE)
    angles = _angles(rows)
    num_bytes = rows * HEAD_DIM * 2 * (2 * (HEADS + KV_HEADS) + KV_HEADS + 2 * KV_HEADS)
    inputs = [_random(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(_copies(num_bytes))]
    return Case(f"rotate_and_write {rows}", [partial(rotate_and_write, x, angles, places, pool, 1) for x in inputs], num_bytes)


def _angles(rows: int) -> Angles:
    return Angles(torch.rand(rows, HEAD_DIM // 2, device="cuda"), torch.rand(rows, HEAD_DIM // 2, device="cuda"))


def _pool(num_blocks: int, layers: int = 1) -> torch.Tensor:
    return _random(num_blocks, layers, 2, KV_HEADS, PAGE, HEAD_DIM)


def _skinny(tunes: bool) -> Iterator[Case]:
    for name, (width, height) in MATRICES.items():
        num_bytes = width * height * 2.0
        weights = [_random(height, width) / 64 for _ in range(_copies(num_bytes))]
        for rows in (1, 16, 64) if tunes else (1, 2, 8, 16, 32, 64):
            x = _random(rows, width)
            torch_calls: list[Call] = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
            tiles: list[Tile | None] = [None, *((VECTOR_TILES if rows == 1 else SKINNY_TILES) if tunes else [])]
            for tile in tiles:
                label = f"skinny {name} {rows}" + ("" if tile is None else f" {_show(tile)}")
                product = _product(name, rows, tile)
                calls: list[Call] = [partial(product, x, weight) for weight in weights]
                yield Case(label, calls, num_bytes, 0, torch_calls if tile is None else None)


def _product(name: str, rows: int, tile: Tile | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """As in llm.gpu.few_rows; torch's product beside it does without what is folded in."""
    around = Around(
        norm=torch.rand(HIDDEN, device="cuda") if rows == 1 else None, silu_mul=name == "gate_up", float32=name == "head"
    )
    if name in ("output", "down"):
        if rows > 1:
            return partial(linear_parts, tile=tile)
        around = Around(residual=torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device="cuda"))
    return partial(skinny_linear, around=around, tile=tile)


def _show(tile: Tile) -> str:
    return f"[{tile.outputs}x{tile.inputs} warps {tile.num_warps} stages {tile.num_stages}]"


def _drawing() -> Iterator[Case]:
    for rows in (1, 64):
        logits = [torch.randn(rows, VOCAB, device="cuda") for _ in range(_copies(rows * VOCAB * 4))]
        out, likeliest = torch.zeros(rows, dtype=torch.int32, device="cuda"), Argmax(rows, VOCAB, torch.device("cuda"))
        torch_calls: list[Call] = [partial(torch.argmax, x, dim=-1) for x in logits]
        yield Case(f"argmax {rows}", [partial(likeliest, x, out) for x in logits], rows * VOCAB * 4.0, 0, torch_calls)
        full = partial(torch.full, (rows,), device="cuda")
        parameters = DrawParameters(
            full(fill_value=0.8), full(fill_value=50, dtype=torch.int32), full(fill_value=0.9, dtype=torch.float64),
            full(fill_value=0.0), full(fill_value=0.4, dtype=torch.float64),
        )  # fmt: skip
        yield Case(f"draw top_k top_p {rows}", [partial(draw, x, parameters, out) for x in logits], rows * VOCAB * 4.0)


def _blocks() -> Iterator[Case]:
    pool, other = _pool(256, layers=32), _pool(256, layers=32)
    block_bytes = pool[0].numel() * 2
    for count in (16, 64):
        ids, target = (torch.randperm(256, device="cuda")[:count].to(torch.int32) for _ in range(2))
        torch_call: Call = partial(copy_blocks_reference, pool, other, ids, target)
        yield Case(
            f"copy_blocks {count}", [partial(copy_blocks, pool, other, ids, target)], 2.0 * count * block_bytes, 0, [torch_call]
        )
        yield Case(f"block_checksums {count}", [partial(block_checksums, pool, ids)], 1.0 * count * block_bytes)


@dataclass(frozen=True)
class _Paged:
    batch: Batch
    qkv: torch.Tensor
    pool: torch.Tensor
    kv_bytes: float

    def tiles(self, tile_tokens: int, whole: Integers | None = None) -> Tiles:
        cut = cut_tiles(self.batch, tile_tokens, whole)
        arrays = {name: torch.from_numpy(array).cuda() for name, array in cut.items()}
        starts, ids = (torch.from_numpy(array).cuda() for array in (self.batch.block_starts, self.batch.block_ids))
        return Tiles(
            arrays["tile_sequences"], arrays["tile_rows"], arrays["tile_counts"], arrays["tile_positions"], starts, ids,
            len(arrays["tile_rows"]), int(cut["tile_counts"].max(initial=0)),
            () if whole is None else whole_rows(self.batch, whole),
        )  # fmt: skip


def _paged(lengths: list[tuple[int, int]], layers: int) -> _Paged:
    """Sequences of (new, all) tokens over blocks in random order."""
    counts = [-(-total // PAGE) for _, total in lengths]
    order = np.random.default_rng(0).permutation(sum(counts)).tolist()
    ends = np.cumsum(counts)
    slices = [
        SequenceSlice([0] * new, total - new, order[end - count : end])
        for (new, total), count, end in zip(lengths, counts, ends, strict=True)
    ]
    tokens = sum(total for _, total in lengths)
    qkv = _random(sum(new for new, _ in lengths), (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    return _Paged(build_batch(slices, PAGE), qkv, _pool(sum(counts), layers), tokens * KV_HEADS * HEAD_DIM * 4.0)


def _decode_attention(tunes: bool) -> Iterator[Case]:
    mixed = [(1, 200 + 37 * index % 3000) for index in range(63)] + [(1, 16_384)]
    loads = {"1 x 1k": [(1, 1024)], "1 x 8k": [(1, 8192)], "1 x 64k": [(1, 65_536)], "16 x 1k": [(1, 1024)] * 16}
    loads |= {"64 x 1k": [(1, 1024)] * 64, "256 x 1k": [(1, 1024)] * 256, "64 mixed": mixed, "16 x 1k, 4 new": [(4, 1024)] * 16}
    for name, lengths in loads.items():
        layers = _copies(sum(total for _, total in lengths) * KV_HEADS * HEAD_DIM * 4)
        case = _paged(lengths, layers)
        equal = len(set(lengths)) == 1 and lengths[0][0] == 1
        torch_calls = _torch_decode(*lengths[0], len(lengths), layers) if equal else None
        for stretch in STRETCHES if tunes else [Stretch()]:
            attention = PagedAttention(stretch)
            tiles = case.tiles(attention.tile_tokens)
            calls: list[Call] = [partial(attention, case.qkv, tiles, case.pool, layer) for layer in range(layers)]
            detail = (
                f" [{stretch.tokens} warps {stretch.num_warps} stages {stretch.num_stages} least {stretch.least_tokens}]"
                if tunes
                else ""
            )
            yield Case(f"paged_attention {name}{detail}", calls, case.kv_bytes, 0, torch_calls)
            if tiles.max_count == 1:
                angles = _angles(max(total for _, total in lengths))
                calls = [partial(attention.turn_and_attend, case.qkv, angles, tiles, case.pool, layer) for layer in range(layers)]
                yield Case(f"next_token {name}{detail}", calls, case.kv_bytes)


def _torch_decode(new: int, total: int, batch: int, layers: int) -> list[Call]:
    """Contiguous K and V, one length: easier than what paged_attention does."""
    query = _random(batch, HEADS, new, HEAD_DIM)
    return [
        partial(_attend, query, _random(batch, KV_HEADS, total, HEAD_DIM), _random(batch, KV_HEADS, total, HEAD_DIM), False)
        for _ in range(layers)
    ]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _prefill_attention(tunes: bool) -> Iterator[Case]:
    loads = {"1 x 8k": [(8192, 8192)], "1 x 1k": [(1024, 1024)], "8 x 1k": [(1024, 1024)] * 8, "2k after 6k": [(2048, 8192)]}
    for name, lengths in loads.items():
        case = _paged(lengths, 1)
        flops = sum(4.0 * HEADS * HEAD_DIM * new * (total - new + new / 2) for new, total in lengths)
        new, total = lengths[0]
        torch_calls = _torch_prefill(new, len(lengths)) if new == total else None
        for shape in PREFILL_SHAPES if tunes else [Shape()]:
            attention = ChunkAttention(shape)
            call: Call = partial(attention, case.qkv, case.tiles(attention.tile_tokens), case.pool, 0)
            label = f"chunk_attention {name}" + (
                f" [{shape.rows}x{shape.tokens} warps {shape.num_warps} stages {shape.num_stages}]" if tunes else ""
            )
            yield Case(label, [call], 0, flops, torch_calls)
        whole = attention.whole_tokens(case.batch, case.pool)
        if whole is not None and whole.any():
            tiles = case.tiles(attention.tile_tokens, whole)
            yield Case(
                f"chunk_attention {name}, as in use", [partial(attention, case.qkv, tiles, case.pool, 0)], 0, flops, torch_calls
            )


def _torch_prefill(tokens: int, batch: int) -> list[Call]:
    """Contiguous, K and V repeated for each query head as the fastest backend wants them; repeating is not timed."""
    query, key, value = (_random(batch, HEADS, tokens, HEAD_DIM) for _ in range(3))
    return [partial(_best_attention(), query, key, value)]


def _best_attention() -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return call

"""K and V in 8 bits by torch: what the native step is tested against."""

import torch

from llm.batch import Batch
from llm.kv.layout import SCALE_BYTES, KvLayout
from llm.ops.attention import paged_attention
from llm.ops.operations import TorchOperations
from llm.ops.rope import Rotation, rotate_and_write

LARGEST = 127


def layout_of(like: torch.Tensor) -> KvLayout:
    """Of an int8 pool that holds what `like` [blocks, layers, 2, kv, block_tokens, d] does."""
    _, layers, _, kv_heads, block_tokens, head_dim = like.shape
    return KvLayout(layers, kv_heads, head_dim, block_tokens, "int8")


def widened(pool: torch.Tensor) -> torch.Tensor:
    """float32 [blocks, layers, 2, kv, block_tokens, d]"""
    numbers, scales = _parts(pool)
    return numbers * scales[..., None]


def store(pool: torch.Tensor, index: tuple[object, ...], values: torch.Tensor) -> None:
    """values [..., d] to pool[index], whose index reaches the tokens."""
    numbers, scales = _parts(pool)
    most = values.abs().amax(-1)
    inverse = torch.where(most > 0, LARGEST / most, torch.zeros(()))
    numbers[index] = (values * inverse[..., None]).round()
    scales[index] = most / LARGEST
    _fill(pool, numbers, scales)


def mixed(heads: torch.Tensor) -> torch.Tensor:
    """heads [..., d]: a Hadamard transform of each 2^n values, where d is an odd multiple of 2^n."""
    span = heads.shape[-1] & -heads.shape[-1]
    matrix = torch.ones(1, 1)
    while len(matrix) < span:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (heads.unflatten(-1, (-1, span)) @ (matrix / span**0.5)).flatten(-2)


class Int8KvOperations(TorchOperations):
    """The references over such a pool."""

    @staticmethod
    def rotate_and_write(qkv: torch.Tensor, rotation: Rotation, batch: Batch, pool: torch.Tensor, layer: int) -> None:  # type: ignore[override]
        exact = widened(pool)
        rotate_and_write(qkv, rotation, batch, exact, layer)
        blocks, offsets = batch.tensors["row_blocks"], batch.tensors["row_offsets"]
        turned = qkv.view(qkv.shape[0], -1, exact.shape[5])[:, : -exact.shape[3]]
        turned.copy_(mixed(turned))
        for kind in (0, 1):
            place = (blocks, layer, kind, slice(None), offsets)
            store(pool, place, exact[place] if kind else mixed(exact[place]))

    @staticmethod
    def attention(qkv: torch.Tensor, batch: Batch, pool: torch.Tensor, layer: int) -> torch.Tensor:  # type: ignore[override]
        return paged_attention(qkv, batch, widened(pool), layer)


def _parts(pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [blocks, layers, 2, kv, block_tokens, d] and scales [..., block_tokens], as float32; both are copies."""
    tokens, size = pool.shape[4], pool.shape[5] - SCALE_BYTES
    lines = pool.flatten(4)
    numbers = lines[..., : tokens * size].unflatten(-1, (tokens, size)).to(torch.float32)
    return numbers, lines[..., tokens * size :].contiguous().view(torch.float32)


def _fill(pool: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> None:
    lines = torch.cat((numbers.to(torch.int8).flatten(4), scales.view(torch.int8)), dim=-1)
    pool.copy_(lines.view(pool.shape))

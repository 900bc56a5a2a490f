"""The shape of a KV block."""

import math
from dataclasses import dataclass
from typing import Literal

KvDtype = Literal["float32", "bfloat16", "float16", "int8"]

_ITEM_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
KvWish = Literal["auto", "float32", "bfloat16", "int8"]
"""`auto`: float32 where the model is to be exact, else bfloat16."""
SCALE_BYTES = 4
"""In int8 the numbers of a token's K or V of one head are times a float32 of their own."""
_STRETCH_BYTES = 1024
"""What checksums are taken of at once; see llm.kv.host_copies."""


@dataclass(frozen=True)
class KvLayout:
    """A block is [num_layers, 2, num_kv_heads, block_tokens, head_dim] of `dtype`, contiguous; of the 2, keys come first.

    In int8 the numbers of a head's block_tokens tokens are followed by those tokens' scales, and the block is filled up with zeros.
    Keys are mixed there: a Hadamard transform of each 2^n of their values, where head_dim is an odd multiple of 2^n.
    `num_kv_heads` counts the heads of one worker; `tensor_parallel_size` workers hold that many each.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: KvDtype
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Items of `dtype`. In int8 the last counts a token's bytes with its scale, though scales lie behind all numbers."""
        token_items = self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)
        return (self.num_layers, 2, self.num_kv_heads, self.block_tokens, token_items)

    @property
    def block_bytes(self) -> int:
        """From one block to the next."""
        num_bytes = math.prod(self.block_shape) * _ITEM_BYTES[self.dtype]
        return num_bytes if self.dtype != "int8" else -(-num_bytes // _STRETCH_BYTES) * _STRETCH_BYTES

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens; the last may be part full."""
        return -(-num_tokens // self.block_tokens)

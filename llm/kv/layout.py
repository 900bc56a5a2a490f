"""The shape of a KV block."""

from dataclasses import dataclass
from typing import Literal

KvDtype = Literal["float32", "bfloat16", "float16"]

_ITEM_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvLayout:
    """A block is [num_layers, 2, num_kv_heads, block_tokens, head_dim] of `dtype`, contiguous; of the 2, keys come first.

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
        return (self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_tokens * self.head_dim * _ITEM_BYTES[self.dtype]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens; the last may be part full."""
        return -(-num_tokens // self.block_tokens)

"""Names for the blocks of a prompt, such that equal names mean equal tokens from the prompt's start to the block's end."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes
"""16 bytes."""

ROOT: BlockHash = bytes(16)
"""The parent of a prompt's first block."""


class PromptBytes:
    """A prompt's tokens as bytes, made once; blocks of it are hashed when asked for.

    BLAKE2b and not a faster hash: two prompts with one name would share KV, so finding such a pair must be infeasible for a user
    who may choose prompts freely. About 1 us a block.
    """

    def __init__(self, token_ids: Sequence[int], block_tokens: int) -> None:
        tokens = array("I", token_ids)
        self._bytes = tokens.tobytes()
        self._block_bytes = block_tokens * tokens.itemsize

    def block_hash(self, parent: BlockHash, index: int) -> BlockHash:
        """The name of full block `index`, given that of the block before it."""
        start = index * self._block_bytes
        return blake2b(parent + self._bytes[start : start + self._block_bytes], digest_size=16).digest()

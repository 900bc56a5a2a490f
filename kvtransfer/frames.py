"""What a producer tells a consumer while a ticket's blocks become ready."""

from dataclasses import dataclass

MAX_ITEMS_PER_FRAME = 256
"""Most blocks, and most checksums, of one frame; more are told in several."""


@dataclass(frozen=True)
class NewsFrame:
    """What is new of a ticket since the frame before; with nothing new, that the producer lives.

    Blocks are told as soon as they are complete, their checksums as soon as they are known: at the same time or later, so that a
    consumer copies while the producer still reads. Only a block that has its checksum may be used.
    """

    epoch: int
    first_block_index: int
    """The blocks from there on, `num_blocks` of them, are complete, and will not change while the lease lasts."""
    num_blocks: int
    first_checksum_index: int
    checksums: tuple[int, ...]
    """XXH3-64 of the bytes of the blocks from `first_checksum_index` on."""
    first_token_id: int | None = None
    """The first token of the completion, once the prompt is computed."""

    @property
    def has_news(self) -> bool:
        return bool(self.num_blocks or self.checksums) or self.first_token_id is not None

"""What a producer tells a consumer while a ticket's blocks become ready, whichever way it travels."""

from dataclasses import dataclass

MAX_BLOCKS_PER_FRAME = 256
"""Keeps a frame's header small; longer runs are told in several frames."""


@dataclass(frozen=True)
class BlocksFrame:
    """The blocks from index `first_block_index` of the ticket on are complete, and will not change while the lease lasts."""

    epoch: int
    first_block_index: int
    checksums: tuple[int, ...]
    """XXH3-64 of each block's bytes."""


@dataclass(frozen=True)
class EndFrame:
    """Every block has been told; the prompt is computed."""

    epoch: int
    first_token_id: int


@dataclass(frozen=True)
class WaitFrame:
    """Nothing new; the producer lives."""

    epoch: int


Frame = BlocksFrame | EndFrame | WaitFrame

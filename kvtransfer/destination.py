"""Where pulled blocks arrive and are verified, and for whom."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtransfer.pull_state import DamagedBlockError, PullState
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.copying import Event


class Recipient(Protocol):
    """For whom blocks are pulled, if it can begin with blocks that a device is still copying and nobody has verified. On the event
    loop."""

    def coming(self, first_token_id: int, after: Sequence[Event]) -> None:
        """All blocks are in place when the device has passed `after`. May be said again."""

    def withdrawn(self) -> None:
        """Not all of them were good, or came; they are written again from now on. May be said when nothing was coming."""


class Destination:
    """The blocks of the own pool that one ticket is pulled into; `state` knows which of them hold verified content.

    A block is verified when it is in place and its checksum was told, whatever comes first. On the event loop.
    """

    def __init__(self, block_ids: Sequence[int], state: PullState, recipient: Recipient | None = None) -> None:
        self.block_ids: BlockIds = np.asarray(block_ids, np.int32)
        self.state = state
        self.recipient = recipient
        self._found, self._told = (np.zeros(len(block_ids), np.uint64) for _ in range(2))
        self._is_here, self._is_told = (np.zeros(len(block_ids), np.bool_) for _ in range(2))

    def begin_attempt(self) -> None:
        """What is not verified comes again."""
        if self.recipient is not None:
            self.recipient.withdrawn()
        self.state.begin_attempt()
        for known in (self._is_here, self._is_told):
            known[self.state.num_verified :] = False

    def arrived(self, first: int, found: Sums) -> None:
        """Blocks are in place. Raises DamagedBlockError."""
        self._note(first, found, self._found, self._is_here)

    def told(self, first: int, checksums: Sequence[int]) -> None:
        """Checksums are known. Raises DamagedBlockError."""
        self._note(first, np.array(checksums, np.uint64), self._told, self._is_told)

    def _note(self, first: int, sums: Sums, kept: Sums, is_kept: npt.NDArray[np.bool_]) -> None:
        run = slice(first, first + len(sums))
        kept[run], is_kept[run] = sums, True
        known = self._is_here[run] & self._is_told[run]
        if np.count_nonzero(known):
            self._verify(first, known)

    def _verify(self, first: int, known: npt.NDArray[np.bool_]) -> None:
        """`known`: of which blocks from `first` on both are."""
        run = slice(first, first + len(known))
        good = known & (self._found[run] == self._told[run])
        self.state.verified(first, good)
        if np.count_nonzero(good) < np.count_nonzero(known):
            raise DamagedBlockError(first + int((known ^ good).argmax()))

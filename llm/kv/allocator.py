"""Who holds which KV block, and which blocks of finished prompts can serve again. Pure bookkeeping: no tensors."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm.kv.prefix_hash import ROOT, BlockHash, PromptBytes


class OutOfBlocksError(Exception):
    """Fewer blocks are free than were asked for; nothing was changed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} KV blocks are needed, {free} are free")
        self.needed = needed
        self.free = free


@dataclass(frozen=True)
class PromptBlocks:
    """A prompt's blocks in token order; the KV of the first `num_cached_tokens` tokens is in them already."""

    block_ids: tuple[int, ...]
    num_cached_tokens: int


class BlockAllocator:
    """Hands out the blocks of one pool, counting references.

    A block that nobody references is free. If it was committed it keeps its content, and is found by later prompts that begin
    alike, until it is needed: free blocks without content go first, then the least recently used. Not thread-safe: the owner locks.
    `handed_out(block)` is called before a block's content may change: readers outside must learn of it first.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, prefix_cache: bool = True, handed_out: Callable[[int], None] = lambda block: None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._handed_out = handed_out
        self._references = [0] * num_blocks
        # A stack: what was freed last has its memory pages, and perhaps its cache lines, at hand.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._unused_cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[BlockHash, int] = {}
        # What a block's tokens hash to, once committed; of two blocks with equal content only one is in _block_of.
        self._hashes: list[BlockHash | None] = [None] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, cached ones included."""
        return len(self._empty) + len(self._unused_cached)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, each with one reference. Raises OutOfBlocksError."""
        if count > self.num_free:
            raise OutOfBlocksError(count, self.num_free)
        return [self._take() for _ in range(count)]

    def allocate_prompt(self, token_ids: Sequence[int], *, use_cache: bool = True) -> PromptBlocks:
        """Blocks for all of a prompt's tokens: the longest cached chain, then new ones. Raises OutOfBlocksError.

        The last token is never taken from the cache, so that there is something to compute logits from.
        """
        cached = self._cached_chain(token_ids) if use_cache else []
        num_new = -(-len(token_ids) // self.block_tokens) - len(cached)
        num_free = self.num_free - sum(self._references[block] == 0 for block in cached)
        if num_new > num_free:
            raise OutOfBlocksError(num_new, num_free)
        for block in cached:
            self._reference(block)
        return PromptBlocks((*cached, *self.allocate(num_new)), len(cached) * self.block_tokens)

    def commit(self, token_ids: Sequence[int], block_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Makes the full blocks among the first `num_computed_tokens` tokens findable. The caller references the blocks.

        If another block holds the same content already, that one stays the one to be found. May be repeated as more is computed.
        """
        if not self._prefix_cache:
            return
        prompt: PromptBytes | None = None
        parent = ROOT
        for index, block in enumerate(block_ids[: num_computed_tokens // self.block_tokens]):
            assert self._references[block] > 0, f"block {block} is committed by nobody"
            known = self._hashes[block]
            if known is None:
                prompt = prompt or PromptBytes(token_ids, self.block_tokens)
                known = self._hashes[block] = prompt.block_hash(parent, index)
                self._block_of.setdefault(known, block)
            parent = known

    def share(self, block_ids: Sequence[int]) -> None:
        """Adds a reference to each block; they must be referenced already."""
        for block in block_ids:
            assert self._references[block] > 0, f"block {block} is free"
        for block in block_ids:
            self._references[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Takes one reference from each block. Of a prompt's blocks the last become reusable first, so that chains stay whole."""
        for block in reversed(block_ids):
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._retire(block)

    def check_integrity(self) -> None:
        """Asserts that every block is referenced, cached or empty, and only one of these. For tests and idle moments."""
        # By maps and not loops of Python: the simulation does this after every change.
        unreferenced, hash_of = {*self._empty, *self._unused_cached}, self._hashes.__getitem__
        assert self.num_free == len(unreferenced) == self._references.count(0), "a block is lost or in two places"
        assert not any(map(self._references.__getitem__, unreferenced)), "a block is lost or in two places"
        assert not any(map(hash_of, self._empty)), "an empty block has a hash"
        assert all(map(self._findable, self._unused_cached)), "an unused block is kept but cannot be found"
        assert [*map(hash_of, self._block_of.values())] == [*self._block_of], "a name leads to another block"

    def _cached_chain(self, token_ids: Sequence[int]) -> list[int]:
        chain: list[int] = []
        if not self._block_of:
            return chain
        prompt = PromptBytes(token_ids, self.block_tokens)
        parent = ROOT
        for index in range((len(token_ids) - 1) // self.block_tokens):
            parent = prompt.block_hash(parent, index)
            block = self._block_of.get(parent)
            if block is None:
                break
            chain.append(block)
        return chain

    def _reference(self, block: int) -> None:
        if self._references[block] == 0:
            del self._unused_cached[block]
        self._references[block] += 1

    def _take(self) -> int:
        block = self._empty.pop() if self._empty else self._evict()
        self._handed_out(block)
        self._references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._unused_cached.popitem(last=False)
        self._forget(block)
        return block

    def _retire(self, block: int) -> None:
        if self._findable(block):
            self._unused_cached[block] = None
        else:
            self._forget(block)
            self._empty.append(block)

    def _forget(self, block: int) -> None:
        name = self._hashes[block]
        self._hashes[block] = None
        if name is not None and self._block_of.get(name) == block:
            del self._block_of[name]

    def _findable(self, block: int) -> bool:
        name = self._hashes[block]
        return name is not None and self._block_of.get(name) == block

"""A model whose only memory is the KV pool, with a stamp in every position that says what must have been there before it.

Position i of a sequence holds its token and a chain: a hash of the chain before it and of the token. What follows is drawn from the
last chain alone, as read from the pool. So a block that is lost, torn, stale or another request's breaks the chain where it is read
(I4, I5), and changes what is drawn (I2).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import SequenceSlice
from llm.sampling import SampledToken
from tests.simulation import threads
from tests.simulation.loop import Violation
from tests.simulation.process import Process

VOCABULARY_SIZE = 64
CONTEXT_TOKENS = 96
BLOCK_TOKENS = 4
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_tokens=BLOCK_TOKENS, dtype="float32")
END_TOKEN = 2
_BLOCK_WORDS = 2 * BLOCK_TOKENS
"""Tokens, then chains."""

_MASK = 0xFFFFFFFF


def chained(before: int, token: int) -> int:
    mixed = (before ^ (token + 1) * 0x9E3779B1) & _MASK
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & _MASK
    return (mixed ^ mixed >> 13) | 1  # never what an empty block holds


def drawn(chain: int, forbidden: Collection[int]) -> int:
    """The token that follows."""
    state = chain
    while True:
        state = (state * 0x5851F42D + 0x14057B7E) & _MASK
        token = (state >> 16) % VOCABULARY_SIZE
        if token >= END_TOKEN and token not in forbidden:
            return token


def completion(prompt: Sequence[int], max_tokens: int, min_tokens: int = 0, ends: Collection[int] = (END_TOKEN,)) -> list[int]:
    """What an undisturbed run gives."""
    chain = 0
    for token in prompt:
        chain = chained(chain, token)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = drawn(chain, ends if len(tokens) < min_tokens else ())
        tokens.append(token)
        if token in ends:
            break
        chain = chained(chain, token)
    return tokens


@lru_cache(1 << 16)
def _verified(chain: int, count: int, *block: int) -> int:
    """The chain after a block's first `count` positions; 0 if a link is broken. Cached, since every step reads all blocks again."""
    for place in range(count):
        chain = chained(chain, block[place])
        if block[place + BLOCK_TOKENS] != chain:
            return 0
    return chain


class Rows(list[int]):
    """Logits: the chain at each row."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return Rows(super(Rows, self).__getitem__(each) for each in index)
        found = super().__getitem__(index)
        return Rows(found) if isinstance(index, slice) else found


def sample(rows: Rows, wanted: Sequence[Any]) -> list[SampledToken]:
    """Stands for llm.sampling.sample."""
    return [_sampled(chain, row.forbidden_token_ids, row.num_logprobs) for chain, row in zip(rows, wanted, strict=True)]


def _sampled(chain: int, forbidden: Collection[int], num_logprobs: int | None) -> SampledToken:
    token = drawn(chain, forbidden)
    return SampledToken(token) if num_logprobs is None else SampledToken(token, -token / 64, ())


Seconds = Callable[[Sequence[SequenceSlice]], float]
Harm = Callable[[Sequence[SequenceSlice]], None]


class StampedRunner:
    """Stands for llm.runner.ModelRunner in one process.

    `seconds` says what a step takes; `harm` is done at its end and may raise. What was computed earlier is read at the beginning
    and at the end, since what a step in flight stands on must not change; writes come last.
    """

    config = SimpleNamespace(vocab_size=VOCABULARY_SIZE, context_tokens=CONTEXT_TOKENS, num_layers=1, num_kv_heads=1, head_dim=1)
    weight_format = "stamped"
    weight_format_reason = "asked for"
    device_description = "simulated"

    def __init__(self, pool: KvPool, process: Process, seconds: Seconds, harm: Harm) -> None:
        self._process = process
        self._seconds = seconds
        self._harm = harm
        assert pool._memory is not None
        self._words = memoryview(pool._memory).cast("I")
        self._layer_done: Callable[[], None] = lambda: None

    def adopt_thread(self) -> None:
        """Nothing to take over."""

    def report_layers(self, layer_done: Callable[[], None]) -> None:
        """Called from within a step, as far as it goes."""
        self._layer_done = layer_done

    def forward(self, slices: Sequence[SequenceSlice]) -> Rows:
        """Computes at once."""
        before = [self._chain_at(piece) for piece in slices]
        threads.Time.sleep(self._seconds(slices))
        self._harm(slices)
        self._layer_done()
        rows = Rows()
        for piece, chain in zip(slices, before, strict=True):
            if chain != self._chain_at(piece):
                raise self._broken(piece, "changed under a running step")
            self._write(piece, chain, rows)
        return rows

    def _write(self, piece: SequenceSlice, chain: int, rows: Rows) -> None:
        words, last = self._words, len(piece.token_ids) - 1
        for offset, token in enumerate(piece.token_ids):
            chain = chained(chain, token)
            position = piece.start + offset
            at = piece.block_ids[position // BLOCK_TOKENS] * _BLOCK_WORDS + position % BLOCK_TOKENS
            words[at], words[at + BLOCK_TOKENS] = token, chain
            if piece.logits == "all" or (piece.logits == "last" and offset == last):
                rows.append(chain)

    def _chain_at(self, piece: SequenceSlice) -> int:
        """The chain of everything before the piece, each link of it checked."""
        words, chain, left = self._words, 0, piece.start
        for index in range(-(-left // BLOCK_TOKENS)):
            count = min(BLOCK_TOKENS, left)
            block = words[piece.block_ids[index] * _BLOCK_WORDS : (piece.block_ids[index] + 1) * _BLOCK_WORDS].tolist()
            chain = _verified(chain, count, *block)
            if not chain:
                raise self._broken(piece, f"of block {index} is not what was computed")
            left -= count
        return chain

    def _broken(self, piece: SequenceSlice, what: str) -> Violation:
        text = f"I4/I5: {self._process}: KV {what} (sequence of {piece.start} + {len(piece.token_ids)} tokens)"
        threads.loop().violations.append(text)
        return Violation(text)

    def close(self) -> None:
        self._words.release()


class DeviceStep:
    """A step that a device has begun or will begin. Stands for llm.gpu.step.DrawnStep."""

    def __init__(self, before: "DeviceStep | None", ends_at: float) -> None:
        self.before = before
        self.ends_at = ends_at
        self.tokens: list[int] = []
        self.on_host = Rows()
        self.failure: RuntimeError | None = None
        self.chains: Rows | None = None
        """Of the rows whose logits are wanted, once K and V are in the pool."""
        self.filled, self.over = threads.Event(), threads.Event()

    def wait_filled(self) -> None:
        """Waits until K and V of the step's tokens are in the pool."""
        self.filled.wait()
        if self.failure is not None:
            raise self.failure

    def token_ids(self) -> list[int]:
        """Waits for the step's end."""
        self.over.wait()
        if self.failure is not None:
            raise self.failure
        return self.tokens

    def host_logits(self) -> Rows:
        """Of the rows that the host draws from."""
        return self.on_host


_FILLED = 0.9
"""Of a step's time: after it K and V are in the pool, unless the step follows another's tokens."""


class DeviceRunner(StampedRunner):
    """One whose steps go on while its thread does something else, one after the other. Stands for llm.gpu.runner.GpuModelRunner."""

    _last: DeviceStep | None = None
    _failure: RuntimeError | None = None
    """A device that has failed does nothing more."""

    def start_step(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[Any], after: Sequence[Any] = ()
    ) -> DeviceStep:
        loop = threads.loop()
        begins_at = max(loop.time(), self._last.ends_at if self._last is not None else 0.0)
        before = self._last if any(source >= 0 for source in sources) else None
        seconds = self._seconds(slices)
        step = self._last = DeviceStep(before, begins_at + seconds)
        if before is None:
            loop.deliver(self._process, begins_at + _FILLED * seconds, self._fill, step, slices)
        loop.deliver(self._process, step.ends_at, self._complete, step, slices, sources, rows)
        return step

    def _complete(self, step: DeviceStep, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[Any]) -> None:
        """The device's end of a step: what it reads must be what its blocks held for this sequence all along."""
        try:
            self._harm(slices)
        except RuntimeError as error:
            self._failure = error
        step.failure = self._failure
        if self._failure is None:
            chains = step.chains
            if chains is None:
                chains = self._computed([_known(piece, source, step.before) for piece, source in zip(slices, sources, strict=True)])
            else:
                for piece in slices:
                    self._chain_at(replace(piece, start=piece.start + len(piece.token_ids)))
            step.tokens = [
                sampled.token_id if row.fits_device else -1 for sampled, row in zip(sample(chains, rows), rows, strict=True)
            ]
            step.on_host = Rows(chain for chain, row in zip(chains, rows, strict=True) if not row.fits_device)
        step.before = None
        step.filled.set()
        step.over.set()

    def _fill(self, step: DeviceStep, slices: Sequence[SequenceSlice]) -> None:
        """K and V are written; what is left is to draw."""
        step.failure = self._failure
        if self._failure is None:
            step.chains = self._computed(slices)
        step.filled.set()

    def _computed(self, slices: Sequence[SequenceSlice]) -> Rows:
        chains = Rows()
        for piece in slices:
            self._write(piece, self._chain_at(piece), chains)
        return chains


def _known(piece: SequenceSlice, source: int, before: DeviceStep | None) -> SequenceSlice:
    """With the token that the step before has drawn, where it follows that."""
    if source < 0:
        return piece
    assert before is not None
    return replace(piece, token_ids=[before.tokens[source]])

"""A model without weights whose memory is the KV pool: any KV block that is lost, mixed up or torn changes the tokens it draws.

What it writes is stamped, and every read verifies the stamps: keys hold the token and its position, values a sum over the token and
all before it. So a block of another request, of another place or of an older use is told from the right one, and not only guessed
from a wrong token.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch

from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import SequenceSlice

VOCABULARY_SIZE = 251
CONTEXT_TOKENS = 2048
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=4, dtype="float32")

Integers = npt.NDArray[np.int64]
TokenFunction = Callable[[Sequence[int]], int]

_SUM_RANGE = 1 << 23  # whole numbers that float32 holds exactly


class StampError(AssertionError):
    """KV that was read is not what this sequence wrote there."""


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows: a function of every token and its place."""
    tokens = np.asarray(token_ids, np.int64)
    return int(np.dot(np.arange(1, len(tokens) + 1), tokens + 1) % VOCABULARY_SIZE)


def next_letter(token_ids: Sequence[int]) -> int:
    """The same, but always a letter in the byte-level vocabulary of random models."""
    return 3 + ord("a") + next_token(token_ids) % 26


def completion(prompt: Sequence[int], num_tokens: int, token: TokenFunction = next_token) -> list[int]:
    """What the fake model generates greedily."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Stands for llm.runner.ModelRunner. Writes each token into the pool, and reads the whole sequence back from there.

    `gate`, if set, is called before each step: tests hold a step there. `sizes` notes the tokens of every slice of every step.
    """

    config = SimpleNamespace(vocab_size=VOCABULARY_SIZE, context_tokens=CONTEXT_TOKENS, num_layers=2, num_kv_heads=1, head_dim=4)
    weight_format = weight_format_reason = "fake"
    device_description = "fake"

    def __init__(self, pool: KvPool, token: TokenFunction = next_token) -> None:
        self._pool = pool.tensor
        self._token = token
        self.gate: Callable[[], None] = lambda: None
        self.sizes: list[list[int]] = []

    def adopt_thread(self) -> None:
        """Nothing to take over."""

    def report_layers(self, layer_done: Callable[[], None]) -> None:
        """There are none."""

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        self.gate()
        self.sizes.append([len(piece.token_ids) for piece in slices])
        return logits_of([row for piece in slices for row in self._rows(piece)])

    def _rows(self, piece: SequenceSlice) -> list[int]:
        first, last = piece.start, piece.start + len(piece.token_ids)
        before = self._read(piece.block_ids, first)
        tokens = np.concatenate([before, np.asarray(piece.token_ids, np.int64)])
        self._write(piece.block_ids, tokens, first)
        wanted = {"none": [], "last": [last], "all": list(range(first + 1, last + 1))}[piece.logits]
        return [self._token(tokens[:length].tolist()) for length in wanted]

    def _write(self, block_ids: Sequence[int], tokens: Integers, first: int) -> None:
        positions = np.arange(first, len(tokens))
        blocks, offsets = np.asarray(block_ids, np.int64)[positions // LAYOUT.block_tokens], positions % LAYOUT.block_tokens
        stamps = np.stack([tokens + VOCABULARY_SIZE * np.arange(len(tokens)), _running_sums(tokens)])[:, first:]
        values = torch.from_numpy(stamps.T.astype(np.float32))[:, None, :, None, None]  # [tokens, layers, 2, heads, head_dim]
        self._pool[torch.from_numpy(blocks), :, :, :, torch.from_numpy(offsets)] = values

    def _read(self, block_ids: Sequence[int], length: int) -> Integers:
        """The sequence's first tokens as every value in the pool remembers them. Raises StampError."""
        if not length:
            return np.empty(0, np.int64)
        blocks = self._pool[list(block_ids[: -(-length // LAYOUT.block_tokens)])]
        found = blocks.permute(1, 3, 5, 2, 0, 4).reshape(-1, 2, blocks.shape[0] * LAYOUT.block_tokens)[:, :, :length].numpy()
        keys = found[0, 0].astype(np.int64)
        tokens = keys % VOCABULARY_SIZE
        whole = np.stack([keys, _running_sums(tokens)]).astype(np.float32)
        if not np.array_equal(keys // VOCABULARY_SIZE, np.arange(length)) or not (found == whole).all():
            raise StampError(f"blocks {list(block_ids)} do not hold the first {length} tokens of one sequence")
        return tokens


def logits_of(tokens: Sequence[int]) -> torch.Tensor:
    """Logits of rows in which these tokens are by far the likeliest."""
    logits = torch.zeros(len(tokens), VOCABULARY_SIZE)
    logits[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)] = 10.0
    return logits


def _running_sums(tokens: Integers) -> Integers:
    """One number for each token and all before it."""
    places = np.arange(1, len(tokens) + 1, dtype=np.int64)
    sums: Integers = np.cumsum((tokens + 1) * (places * 40_503 + 977)) % _SUM_RANGE
    return sums

"""A model without weights whose memory is the KV pool: any KV block that is lost, mixed up or torn changes the tokens it draws."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.runner import SequenceSlice

VOCABULARY_SIZE = 251
CONTEXT_TOKENS = 2048
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=4, dtype="float32")


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows: a function of every token and its place."""
    return sum((position + 1) * (token + 1) for position, token in enumerate(token_ids)) % VOCABULARY_SIZE


def completion(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake model generates greedily."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Stands for llm.runner.ModelRunner. Writes each token into the pool, and reads the whole sequence back from there.

    `gate`, if set, is called before each step: tests hold a step there. `sizes` notes the tokens of every slice of every step.
    """

    config = SimpleNamespace(vocab_size=VOCABULARY_SIZE, context_tokens=CONTEXT_TOKENS, num_layers=2, num_kv_heads=1, head_dim=4)
    weight_format = "fake"
    device_description = "fake"

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool.tensor
        self.gate = lambda: None
        self.sizes: list[list[int]] = []

    def adopt_thread(self) -> None:
        """Nothing to take over."""

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        self.gate()
        self.sizes.append([len(piece.token_ids) for piece in slices])
        rows = [row for piece in slices for row in self._rows(piece)]
        logits = torch.zeros(len(rows), VOCABULARY_SIZE)
        for index, token in enumerate(rows):
            logits[index, token] = 10.0
        return logits

    def _rows(self, piece: SequenceSlice) -> list[int]:
        first, last = piece.start, piece.start + len(piece.token_ids)
        for position, token in zip(range(first, last), piece.token_ids, strict=True):
            block, offset = piece.block_ids[position // LAYOUT.block_tokens], position % LAYOUT.block_tokens
            self._pool[block, :, :, :, offset] = float(token)
        wanted = {"none": [], "last": [last], "all": list(range(first + 1, last + 1))}[piece.logits]
        return [next_token(self._read(piece.block_ids, length)) for length in wanted]

    def _read(self, block_ids: Sequence[int], length: int) -> list[int]:
        """Tokens as the last layer's values remember them."""
        blocks = self._pool[list(block_ids[: -(-length // LAYOUT.block_tokens)]), -1, 1, 0, :, -1]
        return [int(value) for value in blocks.reshape(-1)[:length]]

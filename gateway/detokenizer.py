"""Tokens to text as they come."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def completion_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Gives the text of a completion token by token, never part of a code point; special tokens have no text.

    All pieces joined equal the text of all tokens at once: bytes that form no code point become U+FFFD.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._bytes_of = tokenizer.completion_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """The rest, if the completion ended within a code point."""
        return self._decode(b"", True)

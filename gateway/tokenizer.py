"""The model's tokenizer, exactly; and the bytes behind each token, so that text can be put together piece by piece."""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from tandem.models import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class Tokenizer:
    """Wraps a `tokenizers` tokenizer whose tokens stand for bytes: byte-level BPE, or sentencepiece's with byte fallback.

    Thread-safe. Raises ModelError if the tokenizer is of another kind.
    """

    def __init__(self, library: LibraryTokenizer) -> None:
        self._library = library
        decoder = _decoder_of(library)
        self._byte_level = "ByteLevel" in decoder
        if not self._byte_level and not {"ByteFallback", "Metaspace"} & decoder:
            raise ModelError(f"the tokenizer's decoder ({', '.join(sorted(decoder)) or 'none'}) is not supported")
        self._strips_first_space = bool({"Strip", "Metaspace"} & decoder) and not self._byte_level
        added = library.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.num_tokens: int = library.get_vocab_size(with_added_tokens=True)
        self.longest_token_characters = max(map(len, library.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`; special tokens in it are recognised. Lets other threads run while it works."""
        # encode() holds the interpreter's lock for seconds on long texts; the batch call does not.
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens that begin a text; bytes that form no code point become U+FFFD."""
        bytes_of = self.completion_bytes if skip_special_tokens else self.token_bytes
        content = b"".join(map(bytes_of, token_ids))
        if self._strips_first_space and content.startswith(b" "):
            content = content[1:]
        return content.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """The text of a token alone; special tokens are visible, part of a code point shows U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def completion_bytes(self, token_id: int) -> bytes:
        """What a token adds to a completion's text: nothing if it is special."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, special ones too; none for an id without a token."""
        content = self._bytes.get(token_id)
        if content is None:
            content = self._bytes[token_id] = self._find_bytes(token_id)
        return content

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._library.id_to_token(token_id)
        if piece is None:
            return b""
        return _byte_level_bytes(piece) if self._byte_level else _sentencepiece_bytes(piece)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory's tokenizer.json."""
    path = directory / "tokenizer.json"
    try:
        library = LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read: {error}") from error
    library.no_truncation()
    library.no_padding()
    return Tokenizer(library)


def byte_level_tokenizer() -> Tokenizer:
    """The tokenizer of random models: 0 <unk>, 1 <s>, 2 </s>, 3 + b for byte b."""
    characters = {byte: character for character, byte in _CHARACTER_BYTES.items()}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {characters[byte]: 3 + byte for byte in range(256)}
    library = LibraryTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(library)


def _decoder_of(library: LibraryTokenizer) -> set[str]:
    """The type names in the tokenizer's decoder, nested ones too."""
    decoder = library.decoder
    return set() if decoder is None else set(re.findall(r'"type":"(\w+)"', decoder.__getstate__().decode()))


def _character_bytes() -> dict[str, int]:
    """GPT-2's table of printable characters for bytes: printable ones stand for themselves, the rest for U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_CHARACTER_BYTES = _character_bytes()
assert set(_CHARACTER_BYTES) == set(ByteLevel.alphabet())


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_CHARACTER_BYTES[character] for character in piece)
    except KeyError:  # a token that was never byte-level text stands for itself
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(piece):
        return bytes((int(byte[1], 16),))
    return piece.replace(_SPACE_MARK, " ").encode()

"""Turns the metadata of a GGUF file into the files that a Hugging Face directory has.

These are tokenizer.json, tokenizer_config.json (chat template, special tokens) and config.json (context, vocabulary, end tokens).
"""

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tandem.models import ModelError

_CONTROL, _USER_DEFINED = 3, 4
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

Metadata = Mapping[str, Any]


def tokenizer_files(metadata: Metadata) -> dict[str, str]:
    """The files' texts by name. Raises ModelError if something is missing, or the kind of tokenizer is not supported."""
    try:
        return _files(metadata)
    except KeyError as error:
        raise ModelError(f"the GGUF file lacks {error}") from error


def _files(metadata: Metadata) -> dict[str, str]:
    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata["general.architecture"]
    config = {
        "max_position_embeddings": metadata[f"{architecture}.context_length"],
        "vocab_size": len(tokens),
        "eos_token_id": [metadata[key] for end in _END_KEYS if (key := f"tokenizer.ggml.{end}") in metadata],
    }
    texts = {
        "chat_template": metadata.get("tokenizer.chat_template"),
        "bos_token": _token(metadata, "bos_token_id"),
        "eos_token": _token(metadata, "eos_token_id"),
    }
    return {
        "tokenizer.json": tokenizer_from_metadata(metadata).to_str(),
        "tokenizer_config.json": json.dumps(texts),
        "config.json": json.dumps(config),
    }


def _token(metadata: Metadata, key: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}")
    return None if token_id is None else metadata["tokenizer.ggml.tokens"][token_id]


def tokenizer_from_metadata(metadata: Metadata) -> Tokenizer:
    """Raises ModelError if the file's kind of tokenizer is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    makers: dict[str, Callable[[Metadata], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise ModelError(f"the GGUF file's tokenizer is of kind {kind!r}; supported: {', '.join(makers)}")
    tokenizer = makers[kind](metadata)
    _add_tokens(tokenizer, metadata)
    _add_begin_token(tokenizer, metadata)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_begin_token(tokenizer: Tokenizer, metadata: Metadata) -> None:
    adds = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    begin = _token(metadata, "bos_token_id")
    if adds and begin is not None:
        special = [(begin, metadata["tokenizer.ggml.bos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin}:0 $A:0", special_tokens=special)


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    return {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: Metadata) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise ModelError(f"the GGUF file's pre-tokenizer {name!r} is not supported; supported: {', '.join(_SPLITS)}")
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[name]())
    tokenizer.decoder = decoders.ByteLevel()
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _by_own_pattern() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _by_digit() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_by_own_pattern()]


def _by_pattern(digits: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    """The pattern of cl100k and its heirs, which differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_SPLITS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "default": _by_own_pattern,
    "gpt-2": _by_own_pattern,
    "smollm": _by_digit,
    "llama-bpe": _by_pattern(r"\p{N}{1,3}"),
    "qwen2": _by_pattern(r"\p{N}"),
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})
_COMPOSED = frozenset({"qwen2"})


def _sentencepiece(metadata: Metadata) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    merges = merges_from_scores(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"])
    unknown = _token(metadata, "unknown_token_id")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefixed else replace
    ends = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model, best first: every way to put a token together from two, by the token's score."""
    ids = {token: number for number, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                heapq.heappush(ranked, (-score, ids[left], ids[right], (left, right)))
    return [heapq.heappop(ranked)[3] for _ in range(len(ranked))]

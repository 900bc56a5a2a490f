"""Tokenizers from GGUF metadata and Hugging Face directories."""

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from gateway.gguf_conversion import convert, converted_directory
from gateway.gguf_metadata import read_gguf_metadata
from gateway.gguf_tokenizer import tokenizer_from_metadata
from gateway.served_model import load_served_model
from gateway.templates import Message
from gateway.tokenizer import _CHARACTER_BYTES, Tokenizer
from tandem.models import ModelError, ModelFiles, resolve_model

CHARACTER_OF = {byte: character for character, byte in _CHARACTER_BYTES.items()}
SPACE = CHARACTER_OF[ord(" ")]


def byte_level_metadata(pre: str = "smollm") -> dict[str, Any]:
    """A GPT-2 style vocabulary: three control tokens, all bytes, a few merges."""
    tokens = [
        "<|end|>",
        "<|im_start|>",
        "<|im_end|>",
        *(CHARACTER_OF[byte] for byte in range(256)),
        "12",
        "he",
        "ll",
        "hell",
        f"{SPACE}w",
    ]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["1 2", "h e", "l l", "he ll", f"{SPACE} w"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """A Llama 2 style vocabulary with byte fallback; longer pieces have better scores."""
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(len(word)) for word in words],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def encoded(value: Any) -> bytes:
        match value:
            case bool():
                return struct.pack("<IB", 7, value)
            case int():
                return struct.pack("<II", 4, value)
            case str():
                return struct.pack("<I", 8) + text(value)
            case [str(), *_]:
                return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
            case [float(), *_]:
                return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
            case _:
                return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)

    pairs = b"".join(text(key) + encoded(value) for key, value in metadata.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(metadata)) + pairs)
    return path


@pytest.mark.parametrize("metadata", [byte_level_metadata(), sentencepiece_metadata()])
def test_metadata_is_read_back(tmp_path: Path, metadata: Mapping[str, Any]) -> None:
    assert read_gguf_metadata(write_gguf(tmp_path / "m.gguf", metadata)) == metadata


@pytest.mark.parametrize("length", [0, 3, 20, 30, 100, 2000])
def test_a_cut_or_foreign_file_is_a_model_error(tmp_path: Path, length: int) -> None:
    whole = write_gguf(tmp_path / "m.gguf", byte_level_metadata()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:length])
    (tmp_path / "foreign.gguf").write_bytes(b"x" * length)
    for name in ("cut.gguf", "foreign.gguf"):
        with pytest.raises(ModelError):
            read_gguf_metadata(tmp_path / name)


def tokens_of(metadata: Mapping[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer(tokenizer_from_metadata(metadata))
    ids = tokenizer.encode(text, add_special_tokens=True)
    return [metadata["tokenizer.ggml.tokens"][token_id] for token_id in ids]


def test_byte_level_merges_and_control_tokens() -> None:
    assert tokens_of(byte_level_metadata(), "hello w<|im_end|>") == ["hell", "o", f"{SPACE}w", "<|im_end|>"]


@pytest.mark.parametrize(
    ("pre", "digits"), [("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("llama-bpe", ["12"]), ("default", ["12"])]
)
def test_pre_tokenizers_differ_in_digits(pre: str, digits: list[str]) -> None:
    assert tokens_of(byte_level_metadata(pre), "12") == digits


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    metadata = sentencepiece_metadata()
    assert tokens_of(metadata, "hello") == ["<s>", "\u2581hello"]
    assert tokens_of(metadata, "ü") == ["<s>", "\u2581", "<0xC3>", "<0xBC>"]


@pytest.mark.parametrize("text", ["hello", " hello", "héllo 你好", "🙂 hello"])
def test_sentencepiece_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer(tokenizer_from_metadata(sentencepiece_metadata()))
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer._library.decode(ids)


@pytest.mark.parametrize("change", [{"tokenizer.ggml.model": "bert"}, {"tokenizer.ggml.pre": "mystery"}])
def test_other_kinds_are_refused_by_name(change: Mapping[str, str]) -> None:
    (name,) = change.values()
    with pytest.raises(ModelError, match=name):
        tokenizer_from_metadata(byte_level_metadata() | change)


def test_a_tokenizer_without_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="decoder"):
        Tokenizer(LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_a_gguf_model_is_converted_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata())
    files = ModelFiles("m", "gguf", path, "sha256:abc", "tokenizer:abc")
    model = load_served_model(files, tmp_path / "cache")
    assert (model.context_tokens, model.vocabulary_size, model.end_token_ids) == (64, 264, (0, 2))
    assert model.template is not None
    assert model.template.render([Message("user", "hi")], add_generation_prompt=True) == "<|im_start|>hi<|im_end|>"
    path.unlink()
    again = load_served_model(files, tmp_path / "cache")
    assert again.tokenizer.encode("hello", add_special_tokens=True) == model.tokenizer.encode("hello", add_special_tokens=True)
    assert [entry.name for entry in (tmp_path / "cache" / "tokenizers").iterdir()] == ["sha256-abc-v1"]


def test_a_conversion_that_comes_second_leaves_the_first(tmp_path: Path) -> None:
    path, directory = write_gguf(tmp_path / "m.gguf", byte_level_metadata()), tmp_path / "tokenizers" / "abc-v1"
    convert(path, directory)
    before = (directory / "tokenizer.json").stat().st_ino
    (directory / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ModelError, match="cannot be kept"):
        convert(path, directory)
    (tmp_path / "config.json").rename(directory / "config.json")
    convert(path, directory)
    assert converted_directory(path, "abc", tmp_path) == directory
    assert (directory / "tokenizer.json").stat().st_ino == before
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no model", "not a readable GGUF file"),
        (byte_level_metadata("mystery"), "'mystery' is not supported"),
        ({"general.architecture": "llama"}, "lacks 'tokenizer.ggml.tokens'"),
    ],
)
def test_what_the_converting_process_refuses_is_said(tmp_path: Path, content: bytes | Mapping[str, Any], said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content) if isinstance(content, bytes) else write_gguf(path, content)
    with pytest.raises(ModelError) as raised:
        converted_directory(path, "abc", tmp_path / "cache")
    assert str(raised.value).startswith(f"the tokenizer of {path} cannot be converted: ")
    assert said in str(raised.value)


def test_a_converting_process_that_dies_is_named_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nkill -9 $$\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(ModelError, match="ended with status -9"):
        converted_directory(tmp_path / "m.gguf", "abc", tmp_path)


def test_the_library_that_reads_gguf_stays_out_of_the_gateway(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata())
    code = (
        "import sys; from pathlib import Path; import gateway.app; from gateway.gguf_conversion import converted_directory;"
        f"converted_directory(Path({str(path)!r}), 'abc', Path({str(tmp_path)!r}));"
        "assert not {'gguf', 'torch'} & set(sys.modules)"
    )
    subprocess.run((sys.executable, "-c", code), check=True)


def hugging_face(directory: Path, config: Mapping[str, Any], **files: str) -> ModelFiles:
    tokenizer_from_metadata(byte_level_metadata()).save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "vocab_size": 300, **config}))
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return ModelFiles("hf", "huggingface", directory, "d", "t")


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    config = json.dumps({"chat_template": "{{ bos_token }}!", "bos_token": {"content": "<b>"}, "eos_token": None})
    files = hugging_face(
        tmp_path, {"eos_token_id": 2}, generation_config__json='{"eos_token_id": [2, 0]}', tokenizer_config__json=config
    )
    model = load_served_model(files, tmp_path)
    assert (model.vocabulary_size, model.end_token_ids) == (300, (0, 2))
    assert model.tokenizer.token_bytes(299) == b""
    assert model.template is not None
    assert model.template.render([], add_generation_prompt=True) == "<b>!"


def test_template_sources(tmp_path: Path) -> None:
    several = json.dumps({"chat_template": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]})
    files = hugging_face(tmp_path, {"eos_token_id": None}, tokenizer_config__json=several)
    model = load_served_model(files, tmp_path)
    assert model.end_token_ids == ()
    assert model.template is not None and model.template.render([], add_generation_prompt=True) == "one"
    (tmp_path / "chat_template.jinja").write_text("three")
    model = load_served_model(files, tmp_path)
    assert model.template is not None and model.template.render([], add_generation_prompt=True) == "three"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_served_model(files, tmp_path).template is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{}"), ("config.json", "["), ("tokenizer.json", "{}"), ("chat_template.jinja", "{% if %}")],
)
def test_broken_files_are_model_errors(tmp_path: Path, name: str, content: str) -> None:
    files = hugging_face(tmp_path, {"eos_token_id": 2})
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError):
        load_served_model(files, tmp_path)


def test_random_models_have_bytes_for_tokens(tmp_path: Path) -> None:
    model = load_served_model(resolve_model("random:tiny"), tmp_path)
    assert model.tokenizer.encode("<s>aü", add_special_tokens=True) == [1, 3 + ord("a"), 3 + 0xC3, 3 + 0xBC]
    assert (model.vocabulary_size, model.context_tokens, model.end_token_ids) == (512, 2048, (2,))

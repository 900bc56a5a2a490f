"""What a model name means."""

import dataclasses
import json
from pathlib import Path

import pytest

from tandem.models import RANDOM_MODELS, ModelError, cache_directory, resolve_model, writable_cache_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory with two shards."""
    found = tmp_path / "llama-x"
    found.mkdir()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (found / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (found / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    for shard in shards:
        (found / shard).write_bytes(shard.encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (found / name).write_text("{}")
    return found


def gguf(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(b"GGUF" + content)
    return path


@pytest.mark.parametrize("shape", RANDOM_MODELS)
def test_random_models_need_no_file(shape: str) -> None:
    files = resolve_model(f"random:{shape}", download=False)
    assert (files.format, files.path, files.name) == ("random", None, f"random:{shape}")
    assert files.random_config == RANDOM_MODELS[shape]
    assert files == resolve_model(f"random:{shape}")


def test_random_models_differ() -> None:
    assert len({resolve_model(f"random:{shape}").digest for shape in RANDOM_MODELS}) == len(RANDOM_MODELS)


def test_gguf_path_by_content(tmp_path: Path) -> None:
    first, copy = resolve_model(str(gguf(tmp_path / "one.gguf"))), resolve_model(str(gguf(tmp_path / "two.gguf")))
    other = resolve_model(str(gguf(tmp_path / "three.gguf", b"other")))
    assert (first.format, first.name, first.path) == ("gguf", "one", tmp_path / "one.gguf")
    assert (first.digest, first.tokenizer_digest) == (copy.digest, copy.tokenizer_digest)
    assert first.digest != other.digest and first.tokenizer_digest != other.tokenizer_digest


def test_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    gguf(tmp_path / "one.gguf")
    assert resolve_model(str(tmp_path)).path == tmp_path / "one.gguf"
    gguf(tmp_path / "two.gguf")
    with pytest.raises(ModelError, match="several"):
        resolve_model(str(tmp_path))


def test_hugging_face_directory(directory: Path) -> None:
    files = resolve_model(str(directory))
    assert (files.format, files.name, files.path) == ("huggingface", "llama-x", directory)


def test_weights_and_tokenizer_have_digests_of_their_own(directory: Path) -> None:
    before = resolve_model(str(directory))
    (directory / "tokenizer_config.json").write_text('{"x": 1}')
    after = resolve_model(str(directory))
    assert after.digest == before.digest and after.tokenizer_digest != before.tokenizer_digest
    (directory / "config.json").write_text('{"hidden_size": 9}')
    assert resolve_model(str(directory)).digest != before.digest


@pytest.mark.parametrize("missing", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_incomplete_directory_is_refused_by_name(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        resolve_model(str(directory))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "notes.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither"):
        resolve_model(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["smollm2-135m-instruc", "random:tinny", "no/such/file.gguf", "x.gguf", ""])
def test_unknown_names_list_the_known_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        resolve_model(name, download=False)


def test_unreachable_hub_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path))
    with pytest.raises(ModelError, match="nobody/nothing") as failure:
        resolve_model("nobody/nothing", download=False)
    assert "path" in str(failure.value)


def test_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TANDEM_CACHE_DIR", raising=False)
    assert cache_directory() == tmp_path / "xdg" / "tandem"
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_model_files_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_model("random:tiny").name = "x"  # type: ignore[misc]


def test_a_cache_directory_that_cannot_be_had_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "made"))
    assert writable_cache_directory().is_dir()
    (tmp_path / "file").write_text("no directory")
    for name in ("file", "file/below"):
        monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / name))
        with pytest.raises(ModelError, match="Set TANDEM_CACHE_DIR"):
            writable_cache_directory()

"""Weights from GGUF files, Hugging Face directories and seeds, converted once and mapped."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llm.config import load_model_config
from llm.errors import WeightsError
from llm.gguf_file import open_gguf
from llm.weights import WeightRequest, load_tensors
from llm.weights_file import map_tensors, remove_oldest, write_tensors
from tests.unit.llm.conftest import Files, tiny_config

Kind = gguf.GGMLQuantizationType
QUANTISED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def checkpoint(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names."""
    torch.manual_seed(3)
    hidden, size, ffn = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden), "model.norm.weight": torch.rand(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        matrices = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, query)}
        tensors |= {f"{prefix}self_attn.{name}.weight": torch.randn(shape) for name, shape in matrices.items()}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": torch.randn(ffn, hidden) for name in ("gate", "up")}
        tensors[prefix + "mlp.down_proj.weight"] = torch.randn(hidden, ffn)
        tensors |= {f"{prefix}{name}_layernorm.weight": torch.rand(hidden) for name in ("input", "post_attention")}
        if config["architectures"] == ["Qwen2ForCausalLM"]:
            tensors |= {f"{prefix}self_attn.{name}.bias": torch.randn(matrices[name][0]) for name in ("q_proj", "k_proj", "v_proj")}
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            tensors |= {f"{prefix}self_attn.{name}_norm.weight": torch.rand(size) for name in ("q", "k")}
    return tensors


def write_directory(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], num_shards: int = 1) -> Files:
    (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors")
        return Files("test", "huggingface", path)
    shards = {name: f"model-{index % num_shards}.safetensors" for index, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return Files("test", "huggingface", path)


def write_gguf(
    path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], kind: Any, architecture: str = "llama"
) -> Files:
    """As converters do: q and k of the llama architecture with interleaved rows."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_token_list([f"token {index}" for index in range(2000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 2000)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = values.reshape(-1, 2, config["head_dim"] // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stored = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Files("test", "gguf", path)


def gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed or name == "rope_freqs.weight":
        return fixed.get(name, name)
    _, _, index, rest = name.split(".", 3)
    part, _, suffix = rest.rpartition(".")
    return f"blk.{index}.{GGUF_NAMES[part]}.{suffix}"


def load(files: Files, cache: Path, format: Any = "fp32") -> dict[str, torch.Tensor]:
    config = load_model_config(files.format, files.path, files.random_config)
    return load_tensors(WeightRequest(files, config, format, "cpu", cache), lambda *_: None)


def expect(tensors: dict[str, torch.Tensor], source: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    def close(ours: str, *theirs: str) -> None:
        wanted = torch.cat([source[name] for name in theirs])
        assert (tensors[ours].float() - wanted).abs().max() <= tolerance * wanted.abs().max()

    close("embedding", "model.embed_tokens.weight")
    close("norm", "model.norm.weight")
    for index in range(2):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        close(ours + "qkv", *(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"))
        close(ours + "gate_up", theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight")
        close(ours + "output", theirs + "self_attn.o_proj.weight")
        close(ours + "down", theirs + "mlp.down_proj.weight")
        close(ours + "ffn_norm", theirs + "post_attention_layernorm.weight")
        if ours + "qkv_bias" in tensors:
            close(ours + "qkv_bias", *(f"{theirs}self_attn.{name}_proj.bias" for name in "qkv"))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_hugging_face(tmp_path: Path, architecture: str, num_shards: int) -> None:
    config = tiny_config(architectures=[architecture + "ForCausalLM"], tie_word_embeddings=False)
    source = checkpoint(config)
    tensors = load(write_directory(tmp_path, config, source, num_shards), tmp_path / "cache")
    expect(tensors, source)
    assert torch.equal(tensors["head"], source["lm_head.weight"])
    assert ("layers.1.qkv_bias" in tensors, "layers.1.query_norm" in tensors) == (architecture == "Qwen2", architecture == "Qwen3")


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_gguf_types(tmp_path: Path, kind: Any) -> None:
    source = checkpoint(tiny_config())
    tensors = load(write_gguf(tmp_path / "m.gguf", tiny_config(), source, kind), tmp_path / "cache")
    expect(tensors, source, {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 4e-3, Kind.Q8_0: 1e-2}.get(kind, 0.15))


def test_gguf_k_quants_are_the_librarys(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256)
    source = checkpoint(config)
    for kind, scales in ((Kind.Q4_K, slice(0, 4)), (Kind.Q6_K, slice(208, 210))):
        files = write_gguf(tmp_path / f"{kind.name}.gguf", config, source, Kind.F32)
        files = Files("test", "gguf", files.path, digest=kind.name)
        raw = np.random.default_rng(0).integers(0, 256, (256, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        raw[:, scales] = np.tile(np.array([0.01], np.float16).view(np.uint8), (scales.stop - scales.start) // 2)
        replace_tensor(files.path, "blk.1.ffn_down.weight", raw, kind)
        assert torch.equal(load(files, tmp_path)["layers.1.down"], torch.from_numpy(gguf.quants.dequantize(raw, kind)))


def replace_tensor(path: Path | None, name: str, raw: np.ndarray, kind: Any) -> None:
    """Overwrites a float32 tensor in place by one that is smaller, and its type in the header."""
    assert path is not None
    content, info = bytearray(path.read_bytes()), open_gguf(path).tensors[name]
    content[info.offset : info.offset + raw.nbytes] = raw.tobytes()
    place = content.index(name.encode()) + len(name) + 4 + 8 * len(info.shape)
    content[place : place + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_only_llama_rows_are_permuted(tmp_path: Path, architecture: str) -> None:
    config = tiny_config(architectures=[architecture.capitalize() + "ForCausalLM"])
    source = checkpoint(config)
    expect(load(write_gguf(tmp_path / "m.gguf", config, source, Kind.F32, architecture), tmp_path), source)


def test_gguf_rope_factors_divide_frequencies(tmp_path: Path) -> None:
    source = checkpoint(tiny_config())
    plain = load(write_gguf(tmp_path / "a.gguf", tiny_config(), source, Kind.F32), tmp_path / "a")["rope_frequencies"]
    factors = torch.arange(1, 9, dtype=torch.float32)
    files = write_gguf(tmp_path / "b.gguf", tiny_config(), source | {"rope_freqs.weight": factors}, Kind.F32)
    assert torch.equal(load(files, tmp_path / "b")["rope_frequencies"], plain / factors)


def test_header_alone_gives_the_config(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), checkpoint(tiny_config()), Kind.Q8_0).path
    assert path is not None
    config = load_model_config("gguf", path, None)
    assert (config.vocab_size, config.hidden_size, config.num_kv_heads, config.end_token_ids) == (128, 64, 2, (2,))


def test_damaged_gguf_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), checkpoint(tiny_config()), Kind.Q8_0).path
    assert path is not None
    content = path.read_bytes()
    header_bytes = min(info.offset for info in open_gguf(path).tensors.values())
    for length in (*range(0, 400, 7), *range(400, header_bytes - 64, 997)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            open_gguf(path)
    path.write_bytes(content[:-200])
    with pytest.raises(WeightsError, match="damaged"):
        load(Files("test", "gguf", path), tmp_path)
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(WeightsError):
        open_gguf(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    source = checkpoint(tiny_config())
    removed = {name: value for name, value in source.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write_directory(tmp_path, tiny_config(), removed), tmp_path / "cache")
    with pytest.raises(WeightsError, match=r"layers\.0\.down.*\(64, 96\).*\(64, 80\)"):
        load(write_directory(tmp_path, tiny_config(intermediate_size=80), source | crop(source)), tmp_path / "cache")
    assert list((tmp_path / "cache" / "converted").glob("*.safetensors*")) == []


def crop(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:80].clone() for name, value in source.items() if "gate_proj" in name or "up_proj" in name}


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load(Files("test", "huggingface", tmp_path), tmp_path)


def test_bfloat16_matrices_and_float32_vectors(tmp_path: Path) -> None:
    source = checkpoint(tiny_config())
    tensors = load(write_directory(tmp_path, tiny_config(), source), tmp_path / "cache", "bf16")
    expect({name: tensor for name, tensor in tensors.items()}, source, 4e-3)
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim == 2} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim == 1} == {torch.float32}


def test_workers_that_start_together_convert_once(tmp_path: Path) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    config, seen = load_model_config("huggingface", tmp_path, None), []
    request = WeightRequest(files, config, "fp32", "cpu", tmp_path / "cache")
    threads = [threading.Thread(target=load_tensors, args=(request, lambda fraction, text: seen.append(text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("converting" in text for text in seen) == 2 + 2 * 6
    assert [path.suffix for path in sorted((tmp_path / "cache" / "converted").iterdir())] == [".lock", ".safetensors"]


def test_other_formats_and_digests_have_their_own_files(tmp_path: Path) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    load(files, tmp_path / "cache")
    load(files, tmp_path / "cache", "bf16")
    load(Files("test", "huggingface", tmp_path, digest="sha256:../../x"), tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "converted").glob("*.safetensors"))) == 3


def test_converted_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load(write_directory(tmp_path, tiny_config(), checkpoint(tiny_config())), tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "converted").glob("*.safetensors")
    assert load_file(path).keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())


def converted(cache: Path) -> Path:
    (path,) = (cache / "converted").glob("*.safetensors")
    return path


@pytest.mark.parametrize("damage", [b"", b"{{{{", (200).to_bytes(8, "little") + b"{" * 100, "cut off", "longer", "another's"])
def test_a_damaged_or_foreign_converted_file_is_made_again(tmp_path: Path, damage: Any) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    expected = {name: tensor.clone() for name, tensor in load(files, tmp_path / "cache").items()}
    path = converted(tmp_path / "cache")
    whole = path.read_bytes()
    broken = {
        "cut off": whole[:-1],
        "longer": whole + b"x",
        "another's": whole.replace(files.digest.encode(), b"x" * len(files.digest)),
    }
    path.write_bytes(broken.get(damage, damage))
    again = load(files, tmp_path / "cache")
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    assert path.read_bytes() == whole


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(4)
        raise WeightsError("damaged")

    with pytest.raises(WeightsError):
        write_tensors(tmp_path / "x.safetensors", "x", tensors(), 3)
    assert list(tmp_path.iterdir()) == []


def test_a_converted_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Also for who maps the one that it replaces."""
    path = tmp_path / "x.safetensors"
    seen: list[float | None] = []

    def tensors(value: float) -> Iterator[tuple[str, torch.Tensor]]:
        for name in "ab":
            seen.append(map_tensors(path, "x")["b"].sum().item() if path.exists() else None)
            yield name, torch.full((1 << 16,), value)

    write_tensors(path, "x", tensors(1.0), 3)
    earlier = map_tensors(path, "x")
    write_tensors(path, "x", tensors(2.0), 3)
    assert seen == [None, None, 1 << 16, 1 << 16]
    assert earlier["a"].unique().tolist() == [1.0]
    assert map_tensors(path, "x")["a"].unique().tolist() == [2.0]


def test_matrices_of_a_converted_file_are_aligned(tmp_path: Path) -> None:
    tensors = [("odd", torch.zeros(3)), ("a", torch.zeros(16, 4)), ("bytes", torch.zeros(64, dtype=torch.int8))]
    write_tensors(tmp_path / "x.safetensors", "x", tensors, 3)
    found = map_tensors(tmp_path / "x.safetensors", "x")
    assert found.keys() == {"a", "bytes", "odd"}
    assert [found[name].data_ptr() % 64 for name in ("a", "bytes")] == [0, 0]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate("abcd"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(10))
        (tmp_path / f"{name}.lock").touch()
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))
    remove_oldest(tmp_path, 25, in_use=tmp_path / "d.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{kind}" for name in "abd" for kind in ("lock", "safetensors")
    ]
    assert all(tensor_file.stat().st_size == 10 for tensor_file in tmp_path.glob("*.safetensors"))


def test_loading_counts_as_use(tmp_path: Path) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    load(files, tmp_path / "cache")
    os.utime(converted(tmp_path / "cache"), (1, 1))
    load(files, tmp_path / "cache")
    assert converted(tmp_path / "cache").stat().st_mtime > 1


def test_random_weights_follow_the_name(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Qwen3ForCausalLM"])
    one, again = (load(Files("random:a", "random", random_config=config), tmp_path) for _ in range(2))
    other = load(Files("random:b", "random", random_config=config), tmp_path)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["embedding"], other["embedding"])
    assert not torch.equal(one["layers.0.qkv"], one["layers.1.qkv"])
    assert not (tmp_path / "converted").exists()

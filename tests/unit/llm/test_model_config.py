"""Model shapes from config.json and GGUF metadata, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm.config import ModelConfig, from_gguf, from_hugging_face, load_model_config, rope_frequencies
from llm.errors import UnsupportedModelError, WeightsError
from tandem.models import RANDOM_MODELS
from tests.unit.llm.conftest import tiny_config

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {"token_embd.weight": (128, 64)}


def test_llama() -> None:
    config = from_hugging_face(tiny_config())
    assert config == ModelConfig(
        "llama", 2, 64, 96, 4, 2, 16, 128, 512, rope_theta=10000.0, rms_norm_eps=1e-5, tie_embeddings=True, end_token_ids=(2,)
    )
    assert (config.query_size, config.kv_size, config.qkv_size) == (64, 32, 128)


def test_what_older_configs_leave_out() -> None:
    config = tiny_config()
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings", "eos_token_id"):
        del config[key]
    parsed = from_hugging_face(config)
    assert (parsed.num_kv_heads, parsed.head_dim, parsed.rope_theta, parsed.tie_embeddings) == (4, 16, 10000.0, False)
    assert parsed.end_token_ids == ()


def test_newer_configs_keep_rope_in_one_place() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    config = tiny_config(rope_parameters=rope)
    del config["rope_theta"]
    assert rope_frequencies(from_hugging_face(config))[:1] == [0.25]
    assert from_hugging_face(config).rope_theta == 5e5


def test_qwen() -> None:
    second = from_hugging_face(tiny_config(architectures=["Qwen2ForCausalLM"], sliding_window=4, use_sliding_window=False))
    third = from_hugging_face(tiny_config(architectures=["Qwen3ForCausalLM"]))
    assert (second.attention_bias, second.qk_norm, second.sliding_window) == (True, False, None)
    assert (third.attention_bias, third.qk_norm) == (False, True)


def test_a_sliding_window_bounds_the_context() -> None:
    config = from_hugging_face(tiny_config(architectures=["MistralForCausalLM"], sliding_window=100))
    assert (config.sliding_window, config.context_tokens) == (100, 100)


def test_random_models_are_all_served() -> None:
    for config in RANDOM_MODELS.values():
        assert load_model_config("random", None, config).num_layers > 0


def test_llama3_scaling_by_its_bands() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = tiny_config(head_dim=128, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **scaling})
    scaled = rope_frequencies(from_hugging_face(config))
    plain = [500000.0 ** (-index / 64) for index in range(64)]
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == before
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8)
        else:
            assert before / 8 < after < before


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": None},
        {"quantization_config": {"bits": 4}},
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    ],
    ids=str,
)
def test_other_models_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        from_hugging_face(tiny_config(**change))


@pytest.mark.parametrize(
    "change", [{"hidden_size": None}, {"num_hidden_layers": 0}, {"num_key_value_heads": 3}, {"head_dim": 15}], ids=str
)
def test_contradictions_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="model config"):
        from_hugging_face(tiny_config(**change))


def test_directory_with_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=9)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model_config("huggingface", tmp_path, None).end_token_ids == (7, 9)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_unreadable_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_model_config("huggingface", tmp_path, None)


def test_unknown_format() -> None:
    with pytest.raises(UnsupportedModelError, match="onnx"):
        load_model_config("onnx", Path("x"), None)


def test_gguf() -> None:
    config = from_gguf(GGUF | {"tokenizer.ggml.eot_token_id": 5}, SHAPES)
    assert config == ModelConfig("llama", 2, 64, 96, 4, 2, 16, 128, 512, tie_embeddings=True, end_token_ids=(2, 5))
    assert not from_gguf(GGUF, SHAPES | {"output.weight": (128, 64)}).tie_embeddings


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        ({"general.architecture": "gemma"}, {}),
        ({"llama.expert_count": 8}, {}),
        ({"llama.rope.scaling.type": "yarn"}, {}),
        ({"llama.rope.dimension_count": 8}, {}),
        ({"llama.attention.value_length": 32}, {}),
        ({}, {"blk.0.attn_output.bias": (64,)}),
    ],
    ids=str,
)
def test_other_gguf_models_are_refused(change: dict[str, Any], shapes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        from_gguf(GGUF | change, SHAPES | shapes)


def test_gguf_without_embedding() -> None:
    with pytest.raises(WeightsError, match="token_embd"):
        from_gguf(GGUF, {})

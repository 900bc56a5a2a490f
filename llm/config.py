"""The shape of a model, read from a Hugging Face config, GGUF metadata or a plain mapping. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm.errors import UnsupportedModelError, WeightsError

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]

_HUGGING_FACE_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_GGUF_ARCHITECTURES: dict[str, Architecture] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `llama3`: section 3.2 of the Llama 3.1 model card's reference code."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer of the Llama family."""

    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before RoPE (Qwen3)."""
    end_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None
    """Tokens that attention reaches back. `context_tokens` never exceeds it, so attention need not know it."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise WeightsError(f"model config: {name} is {getattr(self, name)}, must be at least 1")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2 or self.context_tokens < 1:
            raise WeightsError(
                f"model config: {self.num_heads} heads over {self.num_kv_heads} kv heads of dimension {self.head_dim}, "
                f"context {self.context_tokens}: heads must divide evenly, the dimension be even, the context positive"
            )

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.query_size + 2 * self.kv_size


def load_model_config(format: str, path: Path | None, random_config: Mapping[str, Any] | None) -> ModelConfig:
    """Reads a model's shape. `format` is "gguf", "huggingface" or "random", as in ModelFiles.

    Raises UnsupportedModelError for models of another kind, WeightsError for damaged files.
    """
    if format == "random" and random_config is not None:
        return from_hugging_face(random_config)
    if format == "huggingface" and path is not None:
        return from_hugging_face(_read_hugging_face(path))
    if format == "gguf" and path is not None:
        from llm.gguf_file import open_gguf

        header = open_gguf(path)
        return from_gguf(header.metadata, {name: info.shape for name, info in header.tensors.items()})
    raise UnsupportedModelError(f"model format {format!r} with path {path}: expected gguf or huggingface with a path, or random")


def _read_hugging_face(directory: Path) -> dict[str, Any]:
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists() and (end := _read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = sorted(set(_as_tuple(end)) | set(_as_tuple(config.get("eos_token_id"))))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """From the content of a config.json. Raises UnsupportedModelError, WeightsError."""
    architecture = _hugging_face_architecture(config)
    _refuse(config.get("quantization_config") is not None, "quantised Hugging Face checkpoints")
    _refuse(config.get("hidden_act", "silu") != "silu", f"activation {config.get('hidden_act')!r}")
    _refuse(bool(config.get("mlp_bias")), "biases in the feed-forward layers")
    _refuse(config.get("partial_rotary_factor", 1.0) != 1.0, "partial rotary embeddings")
    rope = config.get("rope_parameters") or {}
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    window = _sliding_window(architecture, config)
    context = _integer(config, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // max(heads, 1)),
        vocab_size=_integer(config, "vocab_size"),
        context_tokens=min(context, window or context),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(config.get("rope_scaling") or rope),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=architecture == "qwen2" or bool(config.get("attention_bias")),
        qk_norm=architecture == "qwen3",
        end_token_ids=_as_tuple(config.get("eos_token_id")),
        sliding_window=window,
    )


def _hugging_face_architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    for name in names:
        if name in _HUGGING_FACE_ARCHITECTURES:
            return _HUGGING_FACE_ARCHITECTURES[name]
    raise UnsupportedModelError(
        f"architecture {', '.join(map(str, names)) or 'unnamed'}: served are {', '.join(_HUGGING_FACE_ARCHITECTURES)}"
    )


def _sliding_window(architecture: Architecture, config: Mapping[str, Any]) -> int | None:
    used = architecture == "mistral" or bool(config.get("use_sliding_window"))
    window = config.get("sliding_window") if used else None
    return int(window) if window else None


def _rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"RoPE scaling {kind!r}: served are default, linear and llama3")


def from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """From a GGUF file's metadata and its tensors' shapes (rows first). Raises UnsupportedModelError, WeightsError."""
    name = str(metadata.get("general.architecture"))
    if name not in _GGUF_ARCHITECTURES:
        raise UnsupportedModelError(f"GGUF architecture {name!r}: served are {', '.join(_GGUF_ARCHITECTURES)}")
    values = {key.removeprefix(name + "."): value for key, value in metadata.items() if key.startswith(name + ".")}
    _refuse(bool(values.get("expert_count")), "mixture-of-experts models")
    _refuse("blk.0.attn_output.bias" in shapes, "biases on the attention output")
    heads, hidden = _integer(values, "attention.head_count"), _integer(values, "embedding_length")
    head_dim = int(values.get("attention.key_length") or hidden // max(heads, 1))
    _refuse(values.get("attention.value_length", head_dim) != head_dim, "value heads of another size than key heads")
    _refuse(values.get("rope.dimension_count", head_dim) != head_dim, "partial rotary embeddings")
    if "token_embd.weight" not in shapes:
        raise WeightsError("GGUF: tensor token_embd.weight is missing")
    context, window = _integer(values, "context_length"), values.get("attention.sliding_window") or None
    return ModelConfig(
        architecture=_GGUF_ARCHITECTURES[name],
        num_layers=_integer(values, "block_count"),
        hidden_size=hidden,
        intermediate_size=_integer(values, "feed_forward_length"),
        num_heads=heads,
        num_kv_heads=int(values.get("attention.head_count_kv") or heads),
        head_dim=head_dim,
        vocab_size=shapes["token_embd.weight"][0],
        context_tokens=min(context, window or context),
        rope_theta=float(values.get("rope.freq_base") or 10_000.0),
        rope_scaling=_gguf_rope_scaling(values),
        rms_norm_eps=float(values.get("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        end_token_ids=_gguf_end_tokens(metadata),
        sliding_window=window,
    )


def _gguf_rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    """Llama 3's scaling is not here but in the file's rope_freqs tensor."""
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(values["rope.scaling.factor"]))
    raise UnsupportedModelError(f"RoPE scaling {kind!r}: served from GGUF are none, linear and rope_freqs")


def _gguf_end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    return tuple(sorted({int(metadata[f"tokenizer.ggml.{key}"]) for key in keys if f"tokenizer.ggml.{key}" in metadata}))


def rope_frequencies(config: ModelConfig) -> list[float]:
    """Angular frequency of each rotated pair, radians a token, head_dim / 2 values."""
    half = config.head_dim // 2
    frequencies = [config.rope_theta ** (-index / half) for index in range(half)]
    if config.rope_scaling is None:
        return frequencies
    return [_scale_frequency(frequency, config.rope_scaling) for frequency in frequencies]


def _scale_frequency(frequency: float, scaling: RopeScaling) -> float:
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_context_tokens * frequency / (2 * math.pi)
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise WeightsError(f"model config: {key} is {value!r}, must be an integer")
    return value


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise UnsupportedModelError(f"{what} are not served")

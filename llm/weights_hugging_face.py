"""A Hugging Face directory as a source of weights: model.safetensors, or shards with an index."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from llm.errors import WeightsError

_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


class HuggingFaceSource:
    """Opens each shard when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Any] = {}
        self._shards = _read_index(directory)

    def has(self, part: str) -> bool:
        return part != "rope_factors" and _hugging_face_name(part) in self._shards

    def read(self, part: str) -> torch.Tensor:
        name = _hugging_face_name(part)
        if name not in self._shards:
            raise WeightsError(f"{self._directory}: tensor {name} is missing")
        tensor: torch.Tensor = self._shard(self._shards[name]).get_tensor(name)
        return tensor.to(torch.float32)

    def read_blocks(self, part: str) -> None:
        return None

    def _shard(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = _open_shard(self._directory / file_name)
        return self._open[file_name]


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name to the file that holds it."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():
        return dict.fromkeys(_open_shard(single).keys(), single.name)
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{directory}: no model.safetensors and no readable model.safetensors.index.json: {error}") from error
    return {str(name): Path(str(file)).name for name, file in shards.items()}


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def _hugging_face_name(part: str) -> str:
    if match := _LAYER.fullmatch(part):
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    return _NAMES[part]

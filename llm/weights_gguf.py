"""A GGUF file as a source of weights. Dequantising is the gguf library's."""

from __future__ import annotations

import re

import numpy as np
import torch

from llm.config import ModelConfig
from llm.errors import UnsupportedModelError, WeightsError
from llm.gguf_file import GgufFile

_NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "rope_factors": "rope_freqs.weight",
}
_LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "output": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


class GgufSource:
    """Reads tensors one by one; the file stays mapped, not loaded."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._bytes = np.memmap(file.path, dtype=np.uint8, mode="r")

    def has(self, part: str) -> bool:
        return _gguf_name(part) in self._file.tensors

    def read(self, part: str) -> torch.Tensor:
        values = torch.from_numpy(self._dequantise(_gguf_name(part)))
        return self._undo_permutation(part.rpartition(".")[2], values)

    def _dequantise(self, name: str) -> np.ndarray:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._file.tensors.get(name)
        if info is None:
            raise WeightsError(f"{self._file.path}: tensor {name} is missing")
        try:
            kind = GGMLQuantizationType(info.kind)
            block_values, block_bytes = GGML_QUANT_SIZES[kind]
            row_bytes = info.shape[-1] // block_values * block_bytes
            num_bytes = row_bytes * int(np.prod(info.shape[:-1], dtype=np.int64))
            raw = self._bytes[info.offset : info.offset + num_bytes].reshape(*info.shape[:-1], row_bytes)
            return np.array(dequantize(raw, kind), dtype=np.float32).reshape(info.shape)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._file.path}: tensor {name} has a type that cannot be dequantised: {error}"
            ) from error
        except (ValueError, KeyError) as error:
            raise WeightsError(f"{self._file.path}: tensor {name} is damaged: {error}") from error

    def _undo_permutation(self, part: str, values: torch.Tensor) -> torch.Tensor:
        """Converters of the llama architecture store each head's rows interleaved (0, d/2, 1, d/2 + 1, ...)."""
        if self._config.architecture != "llama" or part not in ("q", "k", "q_bias", "k_bias"):
            return values
        heads = self._config.num_heads if part.startswith("q") else self._config.num_kv_heads
        pairs = values.reshape(heads, self._config.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(values.shape)


def _gguf_name(part: str) -> str:
    if match := _LAYER.fullmatch(part):
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}"
    return _NAMES[part]

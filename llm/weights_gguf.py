"""A GGUF file as a source of weights. Dequantising is the gguf library's."""

from __future__ import annotations

import re

import numpy as np
import torch

from llm.config import ModelConfig
from llm.errors import UnsupportedModelError, WeightsError
from llm.gguf_file import GgufFile, GgufTensor
from llm.weights_packed import GROUP, Blocks, EightBitBlocks, FourBitBlocks

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
_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8
"""GGML's numbers of the types."""
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

    def read_blocks(self, part: str) -> Blocks | None:
        """Groups of 32: a scale, in Q4_1 a minimum, then the integers; of 16 bytes the low nibbles come first.

        Q4_0 has no minimum, and its numbers mean 8 less.
        """
        info = self._file.tensors.get(_gguf_name(part))
        if info is None or info.kind not in (_Q4_0, _Q4_1, _Q8_0) or len(info.shape) != 2:
            return None
        raw = self._raw(info).reshape(info.shape[0], info.shape[1] // GROUP, -1)
        scales = raw[:, :, :2].copy().view(np.float16)[:, :, 0]
        kind = part.rpartition(".")[2]
        if info.kind == _Q8_0:
            return EightBitBlocks(self._ordered(kind, raw[:, :, 2:].reshape(info.shape).view(np.int8)), self._ordered(kind, scales))
        minima = raw[:, :, 2:4].copy().view(np.float16)[:, :, 0] if info.kind == _Q4_1 else scales * np.float16(-8)
        halves = raw[:, :, -GROUP // 2 :]
        nibbles = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(info.shape)
        return FourBitBlocks(*(self._ordered(kind, each) for each in (nibbles, scales, minima)))

    def _ordered(self, part: str, values: np.ndarray) -> np.ndarray:
        ordered: np.ndarray = self._undo_permutation(part, torch.from_numpy(values)).numpy()
        return ordered

    def _dequantise(self, name: str) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._file.tensors.get(name)
        if info is None:
            raise WeightsError(f"{self._file.path}: tensor {name} is missing")
        try:
            return np.array(dequantize(self._raw(info), GGMLQuantizationType(info.kind)), dtype=np.float32).reshape(info.shape)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._file.path}: tensor {name} has a type that cannot be dequantised: {error}"
            ) from error
        except (ValueError, KeyError) as error:
            raise WeightsError(f"{self._file.path}: tensor {name} is damaged: {error}") from error

    def _raw(self, info: GgufTensor) -> np.ndarray:
        """The tensor's bytes [..., row bytes]. ValueError if it ends beyond the file or is of an unknown type."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)]
        row_bytes = info.shape[-1] // block_values * block_bytes
        num_bytes = row_bytes * int(np.prod(info.shape[:-1], dtype=np.int64))
        return self._bytes[info.offset : info.offset + num_bytes].reshape(*info.shape[:-1], row_bytes)

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

"""What this processor's own arithmetic and memory allow: measured rates, and the times of a model's work at them. Pure but for
`measure_floors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.cpu_kernel_library import FORMATS, Kernels
from bench.loads import ClosedLoop
from llm.config import ModelConfig, load_model_config
from llm.weights_plan import plan_tensors
from tandem.models import ModelFiles

_BYTES_A_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 34 / 32, "int4": 20 / 32, "w4a8": 20 / 32}
"""A group of 32 has a scale of two bytes, and in int4 an offset too."""
_HEAD_FORMATS = {"int4": "int8", "w4a8": "int8"}
_KV_BYTES = 2


@dataclass(frozen=True)
class Floors:
    """Bytes read and multiply-adds (by weight format) that all threads together manage a second; the model's sizes."""

    read_rate: float
    rates: Mapping[str, float]
    layer_weights: int
    head_weights: int
    attention_size: int
    """Layers times query size: a pair of tokens costs two of these in multiply-adds."""
    kv_size: int
    """Values of K and V of one token."""

    def prefill_s(self, format: str, num_tokens: int) -> float:
        """The layers' products, and the lower half of attention's square in float32."""
        return self.layer_weights * num_tokens / self.rates[format] + self.attention_size * num_tokens**2 / self.rates["fp32"]

    def decode_step_s(self, format: str, batch: int = 1, context: int = 0) -> float:
        """All weights and the context's K and V are read, in bfloat16; or the arithmetic takes longer."""
        head = _HEAD_FORMATS.get(format, format)
        read = self.layer_weights * _BYTES_A_WEIGHT[format] + self.head_weights * _BYTES_A_WEIGHT[head]
        products = self.layer_weights / self.rates[format] + self.head_weights / self.rates[head]
        attention = 2 * self.attention_size * context / self.rates["fp32"]
        return max((read + batch * context * self.kv_size * _KV_BYTES) / self.read_rate, batch * (products + attention))

    def rate(self, load: ClosedLoop, prefill: str, decode: str) -> float:
        """Output tokens a second if both roles, on the same cores, did nothing but their floors' work."""
        steps = load.completion_tokens - 1
        step_s = self.decode_step_s(decode, load.streams, load.prompt_tokens + load.completion_tokens // 2)
        round_s = load.streams * self.prefill_s(prefill, load.prompt_tokens) + steps * step_s
        return load.streams * load.completion_tokens / round_s


def measure_floors(files: ModelFiles, threads: int) -> Floors:
    """Takes 20 seconds, most of it to compile; nothing else should run. SystemExit if there is no compiler."""
    kernels = Kernels(threads, None)
    config = load_model_config(files.format, files.path, files.random_config)
    return Floors(kernels.read_rate, {format: kernels.ceiling(format) for format in FORMATS}, *_sizes(config))


def _sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    layers = sum(
        item.shape[0] * item.shape[1] for item in plan_tensors(config) if item.is_matrix and item.name.startswith("layers.")
    )
    kv_size = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return layers, config.vocab_size * config.hidden_size, config.num_layers * config.query_size, kv_size

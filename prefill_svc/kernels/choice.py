"""What prefill brings to a GPU."""

from __future__ import annotations

from llm.gpu.settings import GpuSettings

_CAPTURED_TOKENS = 1152
"""Prompts are packed to 1,024 tokens, or an eighth more; launching such a step takes the host half as long as the device needs."""


def gpu_settings(device: str, max_prompts: int) -> GpuSettings | None:
    """None for a CPU; up to `max_prompts` prompts may end in one step. Needs Triton only for a GPU."""
    if not device.startswith("cuda"):
        return None
    from prefill_svc.kernels.chunk_attention import ChunkAttention

    return GpuSettings(ChunkAttention(), max_tokens=_CAPTURED_TOKENS, max_rows=max_prompts)

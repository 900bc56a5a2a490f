"""What prefill brings to a GPU."""

from __future__ import annotations

from llm.gpu.settings import GpuSettings


def gpu_settings(device: str) -> GpuSettings | None:
    """None for a CPU. Needs Triton only for a GPU."""
    if not device.startswith("cuda"):
        return None
    from prefill_svc.kernels.chunk_attention import ChunkAttention

    return GpuSettings(ChunkAttention())

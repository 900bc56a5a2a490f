"""What decode brings to a GPU."""

from __future__ import annotations

from llm.gpu.settings import GpuSettings


def gpu_settings(device: str, max_batch: int) -> GpuSettings | None:
    """None for a CPU; steps of up to `max_batch` sequences are captured as graphs. Needs Triton only for a GPU."""
    if not device.startswith("cuda"):
        return None
    from decode_svc.kernels.paged_attention import PagedAttention

    return GpuSettings(PagedAttention(), max_batch)

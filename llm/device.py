"""Which device a worker computes on."""

from __future__ import annotations

import importlib.util

import torch

from llm.errors import DeviceError


def choose_device(name: str) -> str:
    """ "cpu" or "cuda:N". "auto" is the first GPU, or the CPU where there is none or no compiler for its kernels.

    Raises DeviceError if a GPU was named that cannot be used.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() and _has_compiler() else "cpu"
    if name == "cpu":
        return name
    number = int(name.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu, or see `tandem doctor`")
    if number >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if not _has_compiler():
        raise DeviceError(f"--device {name}: the GPU kernels need Triton: pip install 'tandem-serve[cuda]'")
    return f"cuda:{number}"


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _has_compiler() -> bool:
    return importlib.util.find_spec("triton") is not None

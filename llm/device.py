"""Which device a worker computes on."""

from __future__ import annotations

import importlib.util

import torch

from llm.errors import DeviceError


def choose_device(name: str) -> str:
    """ "cpu" or "cuda:N". "auto" is the first GPU, or the CPU where there is none or something that a GPU needs is not installed.

    Raises DeviceError if a GPU was named that cannot be used.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() and not _missing() else "cpu"
    if name == "cpu":
        return name
    number = int(name.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu, or see `tandem doctor`")
    if number >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if _missing():
        raise DeviceError(f"--device {name}: {' and '.join(_missing())} not installed: pip install 'tandem-serve[cuda]'")
    return f"cuda:{number}"


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _missing() -> list[str]:
    """Of what makes the kernels, and of what shares a GPU's memory with other processes."""
    return [name for name in ("triton", "cupy") if importlib.util.find_spec(name) is None]

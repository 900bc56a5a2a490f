"""What there is to compute on. torch is asked in a process of its own, so that this one stays small and quick."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60.0
# Extensions that the CPU kernels profit from, as Linux names them.
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_DRIVER_SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))
_PROBE = """
import importlib.util, json, torch
def describe(number):
    gpu = torch.cuda.get_device_properties(number)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
print(json.dumps({
    "version": torch.__version__,
    "cuda_version": torch.version.cuda or "",
    "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    "num_threads": torch.get_num_threads(),
    "missing": [name for name in ("triton", "cupy") if importlib.util.find_spec(name) is None],
    "gpus": [describe(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
}))
"""


@dataclass(frozen=True)
class TorchReport:
    """What torch says of this machine; `error` is set if it could not be asked."""

    version: str = ""
    cuda_version: str = ""
    cpu_capability: str = ""
    num_threads: int = 0
    gpus: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Packages that are needed on GPUs and are not installed."""
    error: str = ""


def has_gpu_driver(signs: Sequence[Path] = _DRIVER_SIGNS) -> bool:
    """Whether asking torch for GPUs may be worth its seconds."""
    return any(sign.exists() for sign in signs)


def torch_report() -> TorchReport:
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return TorchReport(error=f"importing torch took more than {_TIMEOUT_S:.0f} s")
    if done.returncode:
        return TorchReport(error=(done.stderr.strip().splitlines() or ["importing torch failed"])[-1])
    report = json.loads(done.stdout)
    return TorchReport(**{**report, "gpus": tuple(report["gpus"]), "missing": tuple(report["missing"])})


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The CPU's vector extensions that matter here; empty where the kernel does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.partition(":")[2].split()}
    return [feature for feature in _FEATURES if feature in flags]

"""Settings that both kinds of worker share."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class WeightSettings:
    """How the model computes."""

    device: str = field(default="cpu", metadata={"help": "cpu, cuda:N, or auto: the first GPU, and the CPU where there is none"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "what to compute in; float32 is exact, weights and KV; the others have bfloat16 KV"}
    )
    weights: Literal["auto", "fp32", "bf16", "int8", "int4", "w4a8"] = field(
        default="auto",
        metadata={"help": "weight format; auto: as --dtype says, else the fastest as measured at load of those that predict well"},
    )
    threads: int = field(default=0, metadata={"help": "threads to compute with; 0: one per core"})

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"--device: {self.device!r} is not legal; it takes auto, cpu, or cuda:N with N counted from 0")


@dataclass(frozen=True)
class TransferSettings:
    """How KV blocks travel."""

    transports: tuple[str, ...] = field(
        default=("cuda_ipc", "shm", "nccl", "tcp"), metadata={"help": "transports to use, best first"}
    )
    lease_s: float = field(default=5.0, metadata={"help": "seconds that finished KV blocks wait for the decode worker"})
    kv_host: str = field(default="127.0.0.1", metadata={"help": "interface for the tcp transport to listen on"})
    advertised_host: str = field(default="", metadata={"help": "host name by which other workers reach this one; empty: --host"})


@dataclass(frozen=True)
class WatchdogSettings:
    """When a worker is past hope."""

    stalled_limit_s: float = field(
        default=30.0,
        metadata={
            "help": "seconds without progress after which the process ends, to be started again by what started it; 0: never",
            "minimum": 0,
        },
    )

    @property
    def wedged_s(self) -> float:
        return self.stalled_limit_s or math.inf

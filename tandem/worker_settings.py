"""Settings that both kinds of worker share."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class WeightSettings:
    """How the model computes."""

    device: Literal["cpu"] = field(default="cpu", metadata={"help": "device to compute on"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "weight format; float32 is exact, auto takes the fastest as measured at load"}
    )
    threads: int = field(default=0, metadata={"help": "threads to compute with; 0: one per core"})


@dataclass(frozen=True)
class TransferSettings:
    """How KV blocks travel."""

    transports: tuple[str, ...] = field(default=("shm", "tcp"), metadata={"help": "transports to use, best first"})
    lease_s: float = field(default=5.0, metadata={"help": "seconds that finished KV blocks wait for the decode worker"})
    kv_host: str = field(default="127.0.0.1", metadata={"help": "interface for the tcp transport to listen on"})
    advertised_host: str = field(default="", metadata={"help": "host name by which other workers reach this one; empty: --host"})

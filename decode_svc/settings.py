"""What `python -m decode_svc` can be told."""

from dataclasses import dataclass, field

from llm.kv.settings import KvSettings
from tandem.server import ServerSettings
from tandem.worker_settings import TransferSettings, WatchdogSettings, WeightSettings


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of a decode worker."""

    model: str = field(default="smollm2-135m-instruct", metadata={"help": "model name, path, or hub name"})
    max_batch: int = field(default=0, metadata={"help": "most sequences of one step; 0: 64 on a CPU, 256 on a GPU"})
    max_sequences: int = field(default=256, metadata={"help": "most sequences in the worker; more are refused"})
    recompute_budget: int = field(default=256, metadata={"help": "most tokens per step to compute preempted sequences again"})
    weights: WeightSettings = field(default_factory=WeightSettings)
    kv: KvSettings = field(default_factory=KvSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

    def batch_on(self, device: str) -> int:
        """The largest batch on that kind of device."""
        return self.max_batch or (64 if device == "cpu" else 256)

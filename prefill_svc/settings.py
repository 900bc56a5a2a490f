"""What `python -m prefill_svc` can be told."""

from dataclasses import dataclass, field

from llm.kv.settings import KvSettings
from tandem.server import ServerSettings
from tandem.worker_settings import TransferSettings, WatchdogSettings, WeightSettings


@dataclass(frozen=True)
class PrefillSettings:
    """Settings of a prefill worker."""

    model: str = field(default="smollm2-135m-instruct", metadata={"help": "model name, path, or hub name"})
    token_budget: int = field(
        default=0,
        metadata={
            "help": "most prompt tokens computed in one step, longer prompts are chunked; 0: 512 on a CPU, measured on a GPU"
        },
    )
    max_prompts: int = field(default=256, metadata={"help": "most prompts waiting and running; more are refused"})
    max_queued_tokens: int = field(
        default=262_144, metadata={"help": "most prompt tokens still to compute; more long prompts are refused", "minimum": 1}
    )
    weights: WeightSettings = field(default_factory=WeightSettings)
    kv: KvSettings = field(default_factory=KvSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

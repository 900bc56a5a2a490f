"""How a worker's KV pool is made."""

from dataclasses import dataclass, field

from llm.kv.layout import KvWish


@dataclass(frozen=True)
class KvSettings:
    """How KV blocks are made."""

    kv_blocks: int = field(default=0, metadata={"help": "KV blocks in the pool; 0: as many as --kv-memory-mib holds"})
    kv_memory_mib: int = field(
        default=0,
        metadata={
            "help": "memory for the KV pool in MiB; 0: on a CPU an eighth of the machine's memory, at most 1024, and 512 for"
            " prefill if that holds two prompts of the model's whole context; on a GPU the rest"
        },
    )
    gpu_memory_fraction: float = field(
        default=0.9,
        metadata={"help": "share of the GPU's memory for this worker, weights included", "minimum": 0.05, "maximum": 1.0},
    )
    kv_dtype: KvWish = field(
        default="auto",
        metadata={
            "help": "what KV is kept in, the same for every worker of a suite; auto: as --dtype says; int8: half the bytes, on CPUs"
        },
    )
    block_tokens: int = field(default=16, metadata={"help": "tokens of one KV block; the same for every worker of a suite"})
    prefix_cache: bool = field(default=True, metadata={"help": "keep the KV of finished prompts for later ones that begin alike"})

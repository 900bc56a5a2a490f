"""Tiny models on disk, and where compiled kernels are kept."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tandem.models import cache_directory

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_directory() / "numba"))
os.environ.setdefault("NUMBA_NUM_THREADS", "2")


@dataclass(frozen=True)
class Files:
    """Stands in for tandem.models.ModelFiles."""

    name: str
    format: str
    path: Path | None = None
    digest: str = "0123abcd"
    random_config: dict[str, Any] | None = None


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of a Llama of two layers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    return config | changes


@pytest.fixture
def random_files() -> Any:
    def make(**changes: Any) -> Files:
        return Files("random:test", "random", random_config=tiny_config(**changes))

    return make

"""How large a worker's KV pool is made."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm import startup
from llm.kv.layout import KvLayout
from llm.kv.settings import KvSettings

_GIB, _MIB = 1 << 30, 1 << 20
_LAYOUT = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=16, dtype="bfloat16")


def _bytes(role: Any, context_tokens: int, monkeypatch: pytest.MonkeyPatch, memory_bytes: int = 24 * _GIB) -> int:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory_bytes))
    return startup.host_pool_bytes(_LAYOUT, role, cast(Any, SimpleNamespace(context_tokens=context_tokens)))


def test_a_prefill_worker_gets_half_of_a_decode_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _bytes("decode", 8192, monkeypatch) == _GIB
    assert _bytes("prefill", 8192, monkeypatch) == _GIB // 2


def test_unless_two_whole_contexts_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    per_token = _LAYOUT.block_bytes // 16
    assert _bytes("prefill", 16384, monkeypatch) == 2 * 16384 * per_token
    assert _bytes("prefill", 131072, monkeypatch) == _GIB, "and never more than a decode worker"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_small_machine_gives_an_eighth(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _bytes(role, 8192, monkeypatch, memory_bytes=2 * _GIB) == _GIB // 4


def test_settings_go_first() -> None:
    assert startup.num_blocks(_LAYOUT, KvSettings(), 10 * _LAYOUT.block_bytes) == 10
    assert startup.num_blocks(_LAYOUT, KvSettings(kv_memory_mib=64), 0) == 64 * _MIB // _LAYOUT.block_bytes
    assert startup.num_blocks(_LAYOUT, KvSettings(kv_memory_mib=64, kv_blocks=7), 0) == 7
    assert startup.num_blocks(_LAYOUT, KvSettings(), 1) == 1, "a pool has a block"

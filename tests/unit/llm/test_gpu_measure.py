"""Arithmetic of a GPU's memory and of its step times, and the order in which both are measured, without a device."""

from types import SimpleNamespace

import pytest
import torch

from llm.errors import DeviceError
from llm.gpu import measure as measuring
from llm.gpu.measure import MemoryUse, measure, pool_bytes, smallest_saturating
from llm.kv.layout import KvLayout

GIB = 1 << 30
ALONE = MemoryUse(total=80 * GIB, free=62 * GIB, peak=18 * GIB, held=16 * GIB, num_graphs=20)


def test_a_share_of_the_device_bounds_the_pool() -> None:
    assert 53 * GIB < pool_bytes(ALONE, 0.9) < 54 * GIB
    assert 17 * GIB < pool_bytes(ALONE, 0.45) < 18 * GIB


def test_what_others_hold_is_left_to_them() -> None:
    """The step's own work space is still to come, and is kept free too."""
    crowded = MemoryUse(total=80 * GIB, free=10 * GIB, peak=18 * GIB, held=16 * GIB, num_graphs=0)
    assert pool_bytes(crowded, 0.9) == 8 * GIB - 256 * (1 << 20)


def test_no_room_is_an_error_that_says_what_takes_it() -> None:
    with pytest.raises(DeviceError, match=r"may take 20%.*--gpu-memory-fraction"):
        pool_bytes(ALONE, 0.2)


def test_the_smallest_step_at_about_the_full_rate() -> None:
    assert smallest_saturating({256: 0.010, 512: 0.013, 1024: 0.022, 2048: 0.042, 4096: 0.082}) == 1024
    assert smallest_saturating({512: 1.0}) == 512


class Runner:
    """Computes nothing; notes what it is asked to."""

    device = torch.device("cpu")
    config = SimpleNamespace(context_tokens=64)
    num_graphs = 3

    def __init__(self, max_batch: int) -> None:
        self.max_batch, self.log = max_batch, []

    def attach(self, pool: object) -> None:
        self.log.append(("attach", pool.tensor.shape[0]))

    def detach(self) -> None:
        self.log.append(("detach",))

    def warm_up(self, progress: object) -> None:
        self.log.append(("warm_up",))

    def forward(self, slices: list) -> torch.Tensor:
        (item,) = slices
        assert len(item.token_ids) <= 16 * len(item.block_ids)
        self.log.append((len(item.token_ids), item.logits))
        return torch.zeros(1, 1)


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> KvLayout:
    """And a device of 8 GiB, of which torch had 3 at most."""
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(measuring, "_STEP_SIZES", (8, 32, 128))
    return KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=16, dtype="float32")


def test_the_largest_step_of_a_prefill_worker_wants_all_logits(layout: KvLayout) -> None:
    runner = Runner(max_batch=0)
    measured = measure(runner, layout, 1.0, lambda fraction, text: None)
    assert runner.log[:2] == [("attach", 4), ("warm_up",)]
    assert runner.log[-2:] == [(measured.step_tokens, "all"), ("detach",)]
    assert measured.step_tokens in (16, 64), "no more than the model's context"
    assert 3 * GIB < measured.pool_bytes < 5 * GIB


def test_a_decode_worker_measures_memory_only(layout: KvLayout) -> None:
    runner = Runner(max_batch=4)
    measure(runner, layout, 1.0, lambda fraction, text: None)
    assert runner.log == [("attach", 4), ("warm_up",), (64, "last"), ("detach",)]

"""Which device is chosen, and what is said where one cannot be used."""

import pytest
import torch

from llm import device as devices
from llm.device import choose_device
from llm.errors import DeviceError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two GPUs, and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_missing", list)
    return monkeypatch


@pytest.mark.parametrize(("asked", "given"), [("auto", "cuda:0"), ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_with_gpus(gpus: pytest.MonkeyPatch, asked: str, given: str) -> None:
    assert choose_device(asked) == given


def test_a_gpu_that_is_not_there_is_refused(gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="has 2 GPUs"):
        choose_device("cuda:2")


def test_without_compiler_auto_is_the_cpu_and_a_gpu_is_refused(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(devices, "_missing", lambda: ["triton"])
    assert choose_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="triton not installed"):
        choose_device("cuda:0")


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="sees no GPU"):
        choose_device("cuda:0")

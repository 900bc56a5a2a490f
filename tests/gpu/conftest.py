"""Tests of this folder need a CUDA device."""

import pytest
import torch

from tests.fakes.interpreter import interpret_without_gpu

interpret_without_gpu()


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")

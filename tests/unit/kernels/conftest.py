"""Kernels run on the GPU where there is one, and else on the CPU in Triton's interpreter; its bfloat16 dot is broken there."""

import numpy
import pytest
import torch

from tests.fakes.interpreter import interpret_without_gpu

interpret_without_gpu()
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def scalars_are_indices(monkeypatch):
    """Triton 3.6's interpreter turns one-element arrays into loop bounds in a way that numpy 2.4 no longer allows."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(autouse=True)
def overflow_is_silent_as_on_a_gpu():
    """Padding rows hold whatever the memory held; what is computed from them is thrown away."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The interpreter's small tensors gain nothing from more, and other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

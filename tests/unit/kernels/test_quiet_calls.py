"""The driver's calls, before there is a driver: what is passed on, and what becomes of a refusal."""

import pytest
import torch

from llm.errors import DeviceError
from llm.gpu import quiet_calls


class Function:
    def __init__(self, status):
        self.status, self.calls = status, []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.status


class Library:
    def __init__(self, status=0):
        for name in quiet_calls._PARAMETERS:
            setattr(self, name, Function(status))


@pytest.fixture
def library(request, monkeypatch):
    library = Library(getattr(request, "param", 0))
    quiet_calls._function.cache_clear()
    monkeypatch.setattr(quiet_calls, "_library", lambda: library)
    monkeypatch.setattr(quiet_calls, "_stream", lambda: 77)
    yield library
    quiet_calls._function.cache_clear()


def test_copies_are_as_long_as_asked_for(library):
    ours, theirs = torch.zeros(10, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    quiet_calls.to_device(ours, theirs, 3)
    quiet_calls.to_host(ours, theirs)
    assert library.cuMemcpyHtoDAsync_v2.calls == [(ours.data_ptr(), theirs.data_ptr(), 12, 77)]
    assert library.cuMemcpyDtoHAsync_v2.calls == [(ours.data_ptr(), theirs.data_ptr(), 40, 77)]


@pytest.mark.parametrize("library", [700], indirect=True)
def test_a_refusal_names_call_and_status(library):
    with pytest.raises(DeviceError, match=r"cuMemcpyDtoHAsync_v2 with status 700"):
        quiet_calls.to_host(torch.zeros(1), torch.zeros(1))
    assert len(library.cuMemcpyDtoHAsync_v2.calls) == 1

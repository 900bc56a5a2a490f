"""A kernel launched again, before there is a GPU: what is looked up, and what is passed on."""

import pytest
import torch

compiled = pytest.importorskip("llm.ops.gpu.compiled")


class Kernel:
    """Compiles one thing for each launch that it sees itself."""

    __name__ = "kernel"

    def __init__(self):
        self.looked_up, self.launched_again = [], []

    def __getitem__(self, grid):
        def look_up(*arguments, num_warps):
            self.looked_up.append((grid, arguments, num_warps))
            return Compiled(len(self.looked_up), self.launched_again)

        return look_up


class Compiled:
    def __init__(self, number, launched):
        self.number, self.launched = number, launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((self.number, grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", {})
    return Kernel()


def test_the_second_launch_takes_pointers_to_what_the_first_compiled(kernel):
    memory = torch.zeros(64, dtype=torch.int32)
    first, second = memory[:16], memory[16:]
    compiled.launch(kernel, (3, 4), [first], (7, True), num_warps=4)
    compiled.launch(kernel, (5, 6), [second], (7, True), num_warps=4)
    assert kernel.looked_up == [((3, 4), (first, 7, True), 4)]
    assert kernel.launched_again == [(1, (5, 6, 1), (second.data_ptr(), 7, True))]


def test_other_values_and_other_alignment_are_compiled_anew(kernel):
    memory = torch.zeros(64, dtype=torch.int32)
    for tensor, value in ((memory, 7), (memory, 8), (memory[1:], 7)):
        for _ in range(2):
            compiled.launch(kernel, (1, 1), [tensor], (value,), num_warps=4)
    assert len(kernel.looked_up) == 3
    assert [number for number, _, _ in kernel.launched_again] == [1, 2, 3]

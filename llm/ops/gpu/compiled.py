"""Launches a kernel again as it was compiled before.

Triton looks at every argument of every launch to find what it compiled for such arguments, which takes the host longer than the
launch. What is launched for one block of a hand-off is over sooner than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ALIGNMENT = 16
"""In bytes. Triton compiles by whether a pointer has it, whether an integer is a multiple of it, and whether an integer is 1."""

_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int], tensors: Sequence[torch.Tensor], values: Sequence[int], num_warps: int
) -> None:  # fmt: skip
    """kernel[grid](*tensors, *values) on the current stream; `values` are integers and constants, in the kernel's order.

    They are few for each kernel: a launch with other values than before is compiled, or looked for by Triton, once.
    """
    pointers = [tensor.data_ptr() for tensor in tensors]
    key = (kernel.__name__, tensors[0].device.index, *(pointer % _ALIGNMENT == 0 for pointer in pointers), *values)
    again = _compiled.get(key)
    if again is not None:
        again[*grid, 1](*pointers, *values)
        return
    made = kernel[grid](*tensors, *values, num_warps=num_warps)
    if made is not None:  # as it is in Triton's interpreter
        _compiled[key] = made

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Launches in which a kernel's programs take their places while the kernel before it is still at work.

A decode step is a chain of some two hundred short kernels, and between two of them the memory stands idle for as long as programs
need to start. Launched like this, they have started, and may have read ahead what no kernel writes (weights), when their inputs are
complete. Every kernel so launched calls `wait_for_inputs` before it writes anything, and before it reads what the launch just
before it may have written; whatever is older is complete when its programs start, since that launch waited in turn.
Source: CUDA programming guide, "Programmatic dependent launch". Before Hopper, and in the interpreter, launches are plain ones.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HOPPER = (9, 0)


@lru_cache(maxsize=1)
def dependent_launch() -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel with a parameter EARLY, which it hands to `wait_for_inputs`."""
    early = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _HOPPER
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Returns once all that was launched before has ended; then the next kernel's programs may take their places."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

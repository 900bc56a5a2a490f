"""Where Triton's kernels run in tests."""

import os

import torch


def interpret_without_gpu() -> None:
    """Lets kernels run on the CPU, in Triton's interpreter, unless there is a GPU.

    Heeded when a kernel's module is imported: every conftest.py of a folder whose tests import one calls this.
    """
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

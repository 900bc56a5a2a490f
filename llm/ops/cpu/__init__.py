"""Kernels for CPUs: native code where there is a compiler, else those of numba, which is imported by their modules only."""

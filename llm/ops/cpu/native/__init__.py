"""A whole forward pass on CPUs in one call, compiled from C++ at the first start where a compiler is found."""

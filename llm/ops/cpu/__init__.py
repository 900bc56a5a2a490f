"""Kernels for CPUs, compiled by numba at the first start and kept on disk. Imported only where numba is installed."""

import hashlib
from pathlib import Path

import numba


def _separate_caches() -> None:
    """Numba notices a change of a kernel's own file only, not of the files that it uses, so each version has its own folder."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    if numba.config.CACHE_DIR:
        numba.config.CACHE_DIR = str(Path(numba.config.CACHE_DIR) / hashlib.blake2b(sources, digest_size=8).hexdigest())


_separate_caches()

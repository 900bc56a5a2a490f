"""What a worker process sets before torch and numba are imported, since both read it only then."""

import os

from tandem.models import cache_directory
from tandem.worker_settings import WeightSettings


def prepare_compute(weights: WeightSettings) -> None:
    """Thread counts, how idle threads wait, and where compiled kernels are kept. The user's own variables win."""
    threads = str(weights.threads or os.cpu_count() or 1)
    defaults = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        "NUMBA_CACHE_DIR": str(cache_directory() / "numba"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

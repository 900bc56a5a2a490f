"""What a worker process sets before torch and numba are imported, since both read it only then."""

import os

from tandem.cores import num_usable_cores
from tandem.models import cache_directory
from tandem.worker_settings import WeightSettings


def num_threads(weights: WeightSettings) -> int:
    """As many as were asked for, or one for each core that this process gets the time of."""
    return weights.threads or num_usable_cores()


def prepare_compute(weights: WeightSettings) -> None:
    """Thread counts, how idle threads wait, and where compiled kernels are kept. The user's own variables win.

    Idle OpenMP threads spin for some 200 µs, longer than the gaps within a step: starting a kernel costs 2.5 µs while they spin and
    100 to 200 µs once they sleep, but two workers that share cores pay for every longer spin of the other.
    """
    threads = str(num_threads(weights))
    defaults = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",
        "GOMP_SPINCOUNT": "10000",
        "NUMBA_CACHE_DIR": str(cache_directory() / "numba"),
        "TRITON_CACHE_DIR": str(cache_directory() / "triton"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

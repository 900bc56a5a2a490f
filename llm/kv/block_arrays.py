"""How runs of blocks are named and summed without a Python object for each."""

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]
"""[n] blocks of one pool."""

Sums = npt.NDArray[np.uint64]
"""[n] checksums (XXH3-64), one a block."""

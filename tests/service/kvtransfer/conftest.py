"""What every test of the hand-off is held to."""

import gc
from collections.abc import Iterator

import pytest

from tests.service.kvtransfer.harness import num_mapped_pools


@pytest.fixture(autouse=True)
def no_pool_stays_mapped() -> Iterator[None]:
    """Looks only after the test, since an exception that a test holds on to holds views of the pools."""
    before = num_mapped_pools()
    yield
    gc.collect()
    assert num_mapped_pools() == before

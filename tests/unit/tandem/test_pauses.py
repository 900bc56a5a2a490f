"""What keeps a serving process from being held up."""

import gc
import sys

import pytest

from tandem.pauses import avoid_pauses


@pytest.fixture(autouse=True)
def interpreter_as_before():
    interval = sys.getswitchinterval()
    yield
    gc.unfreeze()
    sys.setswitchinterval(interval)


def test_what_is_loaded_is_not_looked_through_again():
    avoid_pauses()
    assert gc.get_freeze_count() > 0
    assert sys.getswitchinterval() < 0.001

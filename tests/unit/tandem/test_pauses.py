"""What keeps a serving process from being held up."""

import gc

import pytest

from tandem.pauses import avoid_pauses


@pytest.fixture(autouse=True)
def thawed_again():
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_what_is_loaded_is_not_looked_through_again():
    avoid_pauses()
    assert gc.get_freeze_count() > 0


def test_the_collector_seldom_looks_at_what_is_not_young():
    before = gc.get_threshold()
    avoid_pauses()
    now = gc.get_threshold()
    assert now[0] >= 5 * before[0]
    assert now[0] * now[1] >= 50 * before[0] * before[1]

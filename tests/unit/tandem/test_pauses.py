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
    assert now[0] * now[1] >= 50 * before[0] * before[1]


def test_a_look_at_the_youngest_is_a_look_at_few():
    looked_at: list[int] = []

    def note(phase, info):
        if phase == "start" and info["generation"] == 0:
            looked_at.append(len(gc.get_objects(generation=0)))

    avoid_pauses()
    gc.callbacks.append(note)
    try:
        kept = [[] for _ in range(20_000)]
    finally:
        gc.callbacks.remove(note)
    assert len(kept) == 20_000 and looked_at
    assert max(looked_at) <= 1_000

"""Damaged hand-offs, of which none may be admitted; `python -m tests.faults.corruption` does thousands."""

import pytest

from tests.faults.corruption import KINDS, measure


@pytest.mark.parametrize("transport", list(KINDS))
async def test_b2_b3_nothing_damaged_foreign_or_old_is_admitted(transport: str) -> None:
    tally = await measure(transport, 150, seed=1)
    assert tally.admitted == {}
    assert set(tally.noticed) == set(KINDS[transport])
    assert tally.num_harmed > 140

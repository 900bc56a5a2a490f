"""How long a prompt's step keeps the cores while decode steps wait: a share for both, and gaps within the target."""

from collections.abc import Callable

import pytest

from llm.ops.cpu.native.slices import LEAST_S, SHARE, Slices

_LAYER_S = 0.013


def _slice_s(slices: Slices, piece_s: float = _LAYER_S) -> float:
    mine_s = piece_s
    while not slices.is_over(mine_s, piece_s):
        mine_s += piece_s
    return mine_s


def _settled(target_s: float, others_s: float) -> Slices:
    slices = Slices(target_s)
    slices.others_took(others_s)
    return slices


def test_what_others_take_is_not_known_at_first() -> None:
    assert LEAST_S <= _slice_s(Slices(0.2)) < LEAST_S + _LAYER_S


def test_short_steps_of_others_wait_little() -> None:
    assert LEAST_S <= _slice_s(_settled(0.2, 0.006)) < LEAST_S + _LAYER_S


def test_long_steps_of_others_get_their_share() -> None:
    assert SHARE * 0.03 <= _slice_s(_settled(0.5, 0.03)) < SHARE * 0.03 + _LAYER_S


@pytest.mark.parametrize("target_s", [0.15, 0.2, 0.25])
@pytest.mark.parametrize("others_s", [0.006, 0.02, 0.05, 0.07])
def test_a_slice_and_what_follows_stay_within_the_target(target_s: float, others_s: float) -> None:
    assert _slice_s(_settled(target_s, others_s)) + others_s <= target_s


@pytest.mark.parametrize("others_s", [0.18, 0.2, 5.0])
def test_a_prompt_gets_on_beside_steps_that_exceed_the_target(others_s: float) -> None:
    assert LEAST_S <= _slice_s(_settled(0.2, others_s)) < LEAST_S + _LAYER_S


@pytest.mark.parametrize("piece_s", [0.0, 0.001, 0.3])
def test_no_piece_is_too_short_or_long_to_end_a_slice(piece_s: float) -> None:
    assert _settled(0.2, 0.05).is_over(0.4, piece_s)


def _share_of_decode(decode_step_s: Callable[[int], float], batch: int) -> float:
    slices, times = Slices(0.2), [0.0, 0.0]
    for _ in range(50):
        times[0] += _slice_s(slices)
        times[1] += decode_step_s(batch)
        slices.others_took(decode_step_s(batch))
    return times[1] / sum(times)


def test_prompts_get_three_quarters_of_the_time_while_the_target_has_room() -> None:
    """Batches of 16 as measured; 64 of them take longer than the target leaves, and get more."""
    shares = [_share_of_decode(lambda batch: 0.0037 + 0.0028 * batch, batch) for batch in (1, 4, 8, 16, 64)]
    assert all(share <= 1 / (1 + SHARE) for share in shares[:3])
    assert 1 / (1 + SHARE) < shares[3] < 1 / 3
    assert shares == sorted(shares)

"""How long a long step keeps its turn while others wait for theirs. Pure policy: no clock, no lock."""

LEAST_S = 0.05
"""Whoever waits, a slice is no shorter: each costs both sides their caches, and a step must end some time."""
SHARE = 3
"""A slice is so many times as long as what others then do, where the target leaves room: they are decode steps mostly, which get a
quarter of the time, and all of it once the prompts are computed. Few sequences have short steps, and so wait little."""


class Slices:
    """The slices of one engine's long steps. `target_s`: a slice and what others do after it should end within this."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._others_s = 0.0

    def others_took(self, seconds: float) -> None:
        """How long the last turn of others was."""
        self._others_s = seconds

    def is_over(self, mine_s: float, piece_s: float) -> bool:
        """Whether to give way to who waits, after `mine_s` of a slice, if its next piece takes `piece_s`."""
        most_s = max(LEAST_S, self._target_s - self._others_s)
        wanted_s = min(max(LEAST_S, SHARE * self._others_s), most_s)
        return mine_s >= LEAST_S and (mine_s >= wanted_s or mine_s + piece_s > most_s)

"""How quickly places become free while somebody waits for them. Pure policy."""

from collections import deque
from collections.abc import Sequence

# Enough to be steady, few enough to follow a change.
NUM_MOMENTS = 32
# Fewer say nothing.
FEWEST_MOMENTS = 4


class DrainRate:
    """Remembers when places were given to those who waited. Moments are seconds of any one clock.

    Until that can be told, it is taken to be as it was when somebody had to wait the last time: a burst is in the queue by then.
    """

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=NUM_MOMENTS)
        self._last_s: float | None = None

    def began(self, now: float) -> None:
        """Somebody waits, for the first time in a while."""
        if len(self._moments) >= FEWEST_MOMENTS:
            self._last_s = _interval_s(self._moments, self._moments[-1])
        self._moments.clear()
        self._moments.append(now)

    def gave(self, now: float) -> None:
        """A place was given to somebody who had waited."""
        self._moments.append(now)

    def wait_s(self, num_before: int, now: float) -> float | None:
        """How long somebody with so many before him will wait for a place; None as long as that is anybody's guess."""
        enough = len(self._moments) >= FEWEST_MOMENTS
        interval_s = _interval_s(self._moments, now) if enough else self._last_s
        return None if interval_s is None else (num_before + 1) * interval_s


def _interval_s(moments: Sequence[float], now: float) -> float:
    return max(now - moments[0], 1e-3) / (len(moments) - 1)

"""How quickly places become free while somebody waits for them. Pure policy."""

from collections import deque

# Enough to be steady, few enough to follow a change.
NUM_MOMENTS = 32
# Fewer say nothing.
FEWEST_MOMENTS = 4


class DrainRate:
    """Remembers when places were given to those who waited. Moments are seconds of any one clock."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=NUM_MOMENTS)

    def began(self, now: float) -> None:
        """Somebody waits, for the first time in a while."""
        self._moments.clear()
        self._moments.append(now)

    def gave(self, now: float) -> None:
        """A place was given to somebody who had waited."""
        self._moments.append(now)

    def wait_s(self, num_before: int, now: float) -> float | None:
        """How long somebody with so many before him will wait for a place; None as long as that is anybody's guess."""
        if len(self._moments) < FEWEST_MOMENTS:
            return None
        span_s = max(now - self._moments[0], 1e-3)
        return (num_before + 1) * span_s / (len(self._moments) - 1)

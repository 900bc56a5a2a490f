"""Time that passes when a test says so."""


class Clock:
    """Seconds."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Returns at once; so much time has passed."""
        self.slept.append(seconds)
        self.now += seconds

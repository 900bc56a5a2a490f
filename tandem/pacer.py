"""When to launch a step whose predecessor is still running: late, so that newcomers join it, but not too late for the device."""

import math
import time
from collections import deque
from collections.abc import Callable

_SLACK_S = 0.0003
"""For waking up late, and for steps that end early."""
_REMEMBERED_LAUNCHES = 40
_COVERED = 0.95
"""Launches that are quick enough: one that is slow, since other threads hold the interpreter, keeps the device waiting, while one
that begins early costs the next step a newcomer now and then."""

_LONGEST_PAUSE_S = 0.25
"""No step takes much longer, but the time in which a process was stopped counts as its step's."""


class Pacer:
    """Foretells when the device runs out of work, from how long steps of a size took, and how long a launch takes.

    Used by the engine thread alone. `size` is whatever a step's time is proportional to.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep) -> None:
        self._clock, self._sleep = clock, sleep
        self._running: deque[tuple[float, float]] = deque()  # launched at, size
        self._landed_at = 0.0
        self._seconds_per_size: deque[float] = deque(maxlen=3)
        self._launches_s: deque[float] = deque(maxlen=_REMEMBERED_LAUNCHES)
        self._launch_s = 0.0

    def pause(self) -> None:
        """Returns when it is time to launch the next step; at once if nothing runs or nothing is known."""
        pause_s = self.pause_s()
        if pause_s > 0:
            self._sleep(pause_s)

    def pause_s(self) -> float:
        if not self._running or not self._seconds_per_size:
            return 0.0
        ahead = sum(size for _, size in self._running) * min(self._seconds_per_size)
        begin = max(self._landed_at, self._running[0][0])
        return min(begin + ahead - self._launch_s - _SLACK_S - self._clock(), _LONGEST_PAUSE_S)

    def now(self) -> float:
        return self._clock()

    def launched(self, began: float, size: float) -> None:
        """A step was launched; the work for that began at `began`, a value of `now()`."""
        now = self._clock()
        self._launches_s.append(now - began)
        self._launch_s = sorted(self._launches_s)[math.ceil(_COVERED * len(self._launches_s)) - 1]
        self._running.append((now, size))

    def landed(self) -> None:
        """The oldest step that runs is complete."""
        now = self._clock()
        launched_at, size = self._running.popleft()
        self._seconds_per_size.append((now - max(launched_at, self._landed_at)) / size)
        self._landed_at = now

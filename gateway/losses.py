"""Which lost workers have died, as far as there is evidence: their requests may be the cause. Silence is none.

A process has ended if its connection broke while it spoke and took requests, and its address then turns connections away, or
answers for another process. A worker that fell silent (frozen, behind a dead link) has not died under its requests, whatever is
done to it later.
"""

import asyncio
import time
from collections.abc import Callable

from gateway.failover import Loss

# A worker speaks twice a second. Had it been silent for longer when its connection broke, it was frozen or cut off before.
SUDDEN_S = 1.2
# Evidence that has not come by then does not come.
OPEN_S = 2.0
MAX_REMEMBERED = 256


class Losses:
    """One `Loss` for each worker that is lost, or that has broken a request and may be about to be. Used on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._suspected: dict[str, tuple[Loss, float]] = {}
        self._lost: dict[str, tuple[Loss, float]] = {}
        self._settled = asyncio.Event()

    def of(self, worker_id: str) -> Loss:
        """That of a worker which has just broken a request; open until the view of the workers tells more."""
        if worker_id in self._lost:
            return self._lost[worker_id][0]
        loss, _ = self._suspected.setdefault(worker_id, (Loss(), self._clock()))
        self._bound(self._suspected)
        return loss

    def lost(self, worker_id: str, *, suddenly: bool) -> None:
        """The view has lost a worker: `suddenly` if its connection broke while it spoke and took requests."""
        loss, _ = self._suspected.pop(worker_id, (Loss(), 0.0))
        self._lost[worker_id] = (loss, self._clock())
        self._bound(self._lost)
        if not suddenly:
            self._settle(loss, ended=False)

    def open(self, worker_id: str) -> bool:
        """Whether evidence of the end of a lost worker is still looked for."""
        if worker_id not in self._lost:
            return False
        loss, since = self._lost[worker_id]
        if loss.ended is None and self._clock() - since > OPEN_S:
            self._settle(loss, ended=False)
        return loss.ended is None

    def ended(self, worker_id: str) -> None:
        """A lost worker's address turns connections away, or is another's."""
        if worker_id in self._lost:
            self._settle(self._lost[worker_id][0], ended=True)

    def heard(self, worker_id: str) -> None:
        """A worker speaks. One that was lost has not ended; nor has one that goes on for a while after it broke a request."""
        loss, since = self._lost.pop(worker_id, None) or self._suspected.get(worker_id) or (None, 0.0)
        if loss is not None and (worker_id not in self._suspected or self._clock() - since > SUDDEN_S):
            self._suspected.pop(worker_id, None)
            self._settle(loss, ended=False)

    async def settled(self, *losses: Loss) -> None:
        """Waits until it is known of each whether it was a death; not for ever."""
        try:
            async with asyncio.timeout(OPEN_S):
                while any(loss.ended is None for loss in losses):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            for loss in losses:
                self._settle(loss, ended=False)

    def _bound(self, remembered: dict[str, tuple[Loss, float]]) -> None:
        if len(remembered) > MAX_REMEMBERED:
            self._settle(remembered.pop(next(iter(remembered)))[0], ended=False)

    def _settle(self, loss: Loss, *, ended: bool) -> None:
        if loss.ended is None:
            loss.ended = ended
            self._settled.set()

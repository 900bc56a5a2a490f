"""Where a request's time goes: moments on the gateway's monotonic clock, and what workers say about their queues."""

from collections.abc import Callable

from gateway.job import Timings


class Timeline:
    """Takes the moments of one request in their order; its phases are consecutive, so that they add up to the wall time.

    What happens again in a later attempt counts the first time only: the pause between attempts belongs to the phase it falls in.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._arrived = clock()
        self.tokenized_at = self._arrived
        self._placed: float | None = None
        self._first_token: float | None = None
        self._kv_ready: float | None = None
        self.prefill_queue_us = 0
        self.decode_queue_us = 0

    def now(self) -> float:
        """Seconds on the clock of deadlines."""
        return self._clock()

    def tokenized(self) -> None:
        self.tokenized_at = self._clock()

    def placed(self) -> None:
        """A place in the gateway was got and workers were chosen."""
        self._placed = self._clock() if self._placed is None else self._placed

    def first_token(self) -> None:
        self._first_token = self._clock() if self._first_token is None else self._first_token

    def kv_ready(self) -> None:
        self._kv_ready = self._clock() if self._kv_ready is None else self._kv_ready

    def timings(self) -> Timings:
        """The phases up to now; a phase that did not take place is 0."""
        now = self._clock()
        placed = _or(self._placed, now)
        first_token = _or(self._first_token, now)
        # Decode may hold all blocks before the first token has arrived here; without decode there is no hand-off.
        kv_ready = max(_or(self._kv_ready, first_token), first_token)
        prefill_us, decode_us = _us(first_token - placed), _us(now - kv_ready)
        prefill_queue_us, decode_queue_us = min(self.prefill_queue_us, prefill_us), min(self.decode_queue_us, decode_us)
        return Timings(
            tokenize_us=_us(self.tokenized_at - self._arrived),
            gateway_queue_us=_us(placed - self.tokenized_at),
            prefill_queue_us=prefill_queue_us,
            prefill_us=prefill_us - prefill_queue_us,
            handoff_us=_us(kv_ready - first_token),
            decode_queue_us=decode_queue_us,
            decode_us=decode_us - decode_queue_us,
        )


def _or(moment: float | None, otherwise: float) -> float:
    return otherwise if moment is None else moment


def _us(seconds: float) -> int:
    return int(seconds * 1e6)

"""Where a request's time goes: moments on the gateway's monotonic clock, and what workers say about their queues."""

import time
from collections.abc import Callable

from gateway.job import Timings


class Timeline:
    """Takes the moments of one request in their order; its phases are consecutive, so that they add up to the wall time."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._arrived_ns = clock_ns()
        self._tokenized_ns = self._placed_ns = self._first_token_ns = self._kv_ready_ns = 0
        self.prefill_queue_us = 0
        self.decode_queue_us = 0

    def tokenized(self) -> None:
        self._tokenized_ns = self._clock_ns()

    def placed(self) -> None:
        """A place in the gateway was got and workers were chosen."""
        self._placed_ns = self._clock_ns()

    def first_token(self) -> None:
        self._first_token_ns = self._clock_ns()

    def kv_ready(self) -> None:
        self._kv_ready_ns = self._clock_ns()

    def timings(self) -> Timings:
        """The phases up to now; a phase that did not take place is 0."""
        now = self._clock_ns()
        first_token = self._first_token_ns or now
        # Decode may hold all blocks before the first token has arrived here; without decode there is no hand-off.
        kv_ready = max(self._kv_ready_ns, first_token)
        prefill_us, decode_us = (first_token - self._placed_ns) // 1000, (now - kv_ready) // 1000
        prefill_queue_us, decode_queue_us = min(self.prefill_queue_us, prefill_us), min(self.decode_queue_us, decode_us)
        return Timings(
            tokenize_us=(self._tokenized_ns - self._arrived_ns) // 1000,
            gateway_queue_us=(self._placed_ns - self._tokenized_ns) // 1000,
            prefill_queue_us=prefill_queue_us,
            prefill_us=prefill_us - prefill_queue_us,
            handoff_us=(kv_ready - first_token) // 1000,
            decode_queue_us=decode_queue_us,
            decode_us=decode_us - decode_queue_us,
        )

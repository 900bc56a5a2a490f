"""Requests under which workers died, remembered by a hash of what they asked for: they are refused for a while."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from gateway.job import GenerationJob
from tandem.errors import Reason, TandemError

MAX_REMEMBERED = 1024
QUARANTINE_S = 600.0


def fingerprint(job: GenerationJob) -> bytes:
    """Equal for requests with equal tokens and sampling; the seed, which the gateway may have chosen, does not count."""
    digest = hashlib.blake2b(array("Q", job.token_ids).tobytes(), digest_size=16)
    digest.update(repr(replace(job.sampling, seed=0)).encode())
    return digest.digest()


class Quarantine:
    """Holds at most `MAX_REMEMBERED` fingerprints, each for `QUARANTINE_S` seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()
        self.num_added = 0

    def add(self, job: GenerationJob) -> None:
        key = fingerprint(job)
        self._until[key] = self._clock() + QUARANTINE_S
        self._until.move_to_end(key)
        self.num_added += 1
        if len(self._until) > MAX_REMEMBERED:
            self._until.popitem(last=False)

    def check(self, job: GenerationJob) -> None:
        """Raises REQUEST_QUARANTINED if the request is remembered."""
        if not self._until:
            return
        key = fingerprint(job)
        remaining_s = self._until.get(key, 0.0) - self._clock()
        if remaining_s > 0:
            message = f"workers were lost while they ran this request; it is not taken for another {remaining_s:.0f} s"
            raise TandemError(Reason.REQUEST_QUARANTINED, message)
        self._until.pop(key, None)

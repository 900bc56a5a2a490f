"""Idempotency keys of the requests that run, so that a client's second try does not run beside its first."""

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.errors import Reason, TandemError, invalid_field

MAX_KEY_CHARACTERS = 128


class RunningKeys:
    """Remembers no key for longer than its request runs."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        """Holds a key; the empty one is none. Raises ALREADY_EXISTS, or INVALID_REQUEST if it is too long."""
        if len(key) > MAX_KEY_CHARACTERS:
            raise invalid_field("idempotency_key", f"{len(key)} characters are more than {MAX_KEY_CHARACTERS}")
        if key in self._keys:
            raise TandemError(Reason.ALREADY_EXISTS, "a request with this idempotency_key is running")
        if not key:
            yield
            return
        self._keys.add(key)
        try:
            yield
        finally:
            self._keys.remove(key)

"""Which attempts at which requests a worker holds: none is executed twice, and an empty worker may leave."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tandem.errors import Reason, TandemError


@dataclass(eq=False)
class Attempt:
    """One try at a request, for as long as its call runs. `ticket_id` is set once a ticket is granted that may outlive the call."""

    ticket_id: str | None = None


class Attempts:
    """Used on the event loop. `lives` says whether a ticket is still outstanding."""

    def __init__(self, lives: Callable[[str], bool] = lambda ticket_id: False) -> None:
        self._lives = lives
        self._running: dict[tuple[str, int], Attempt] = {}
        self._ended: dict[tuple[str, int], str] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def entered(self, request_id: str, attempt: int) -> Iterator[Attempt]:
        """Holds the attempt. Raises ALREADY_EXISTS if the same one runs, or its ticket is outstanding."""
        key = (request_id, attempt)
        self._ended = {known: ticket_id for known, ticket_id in self._ended.items() if self._lives(ticket_id)}
        if key in self._running or key in self._ended:
            message = f"attempt {attempt} at request {request_id} is here already"
            raise TandemError(Reason.ALREADY_EXISTS, message, metadata={"request_id": request_id, "attempt": str(attempt)})
        entered = self._running[key] = Attempt()
        self._idle.clear()
        try:
            yield entered
        finally:
            del self._running[key]
            if entered.ticket_id is not None:
                self._ended[key] = entered.ticket_id
            if not self._running:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Returns once no attempt runs."""
        await self._idle.wait()

"""What waits to be written to one client."""

import asyncio

from gateway.job import Ending, Output, Token

# More than this waits in the worker's stream instead of here: some 2 MB, and less than a message may hold.
MAX_COST = 16_384


class PendingOutput:
    """Between a relay, which adds, and one writer, which takes. Everything that a slow writer has not taken is one output."""

    def __init__(self, max_cost: int = MAX_COST) -> None:
        self._max_cost = max_cost
        self._cost = 0
        self._output: Output | None = None
        self._ending: Ending | BaseException | None = None
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def add(self, output: Output) -> None:
        pending = self._output
        if pending is None:
            pending = self._output = output
        else:
            pending.text += output.text
            pending.tokens += output.tokens
        self._cost += sum(map(_cost, output.tokens))
        if self._cost >= self._max_cost:
            self._room.clear()
        self._filled.set()

    def finish(self, ending: Ending | BaseException) -> None:
        """Nothing more is added; the writer takes what is left, and then the ending, or gets the exception raised."""
        self._ending = ending
        self._filled.set()

    async def room(self) -> None:
        """Returns once there is room for more."""
        await self._room.wait()

    async def take(self) -> Output | Ending:
        await self._filled.wait()
        output, self._output = self._output, None
        self._cost = 0
        self._room.set()
        if self._ending is None:
            self._filled.clear()
        if output is not None:
            return output
        if isinstance(self._ending, BaseException):
            raise self._ending
        assert self._ending is not None, "filled without output or ending"
        return self._ending


def _cost(token: Token) -> int:
    """A token and each log-probability of another beside it."""
    return 1 + len(token.top)

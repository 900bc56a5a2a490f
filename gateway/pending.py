"""What waits to be written to one client."""

import asyncio

from gateway.job import Ending, Output

# More tokens than this wait in the worker's stream instead of here.
MAX_TOKENS = 4096


class PendingOutput:
    """Between a relay, which adds, and one writer, which takes. Everything that a slow writer has not taken is one output."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
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
        if len(pending.tokens) >= self._max_tokens:
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
        self._room.set()
        if self._ending is None:
            self._filled.clear()
        if output is not None:
            return output
        if isinstance(self._ending, BaseException):
            raise self._ending
        assert self._ending is not None, "filled without output or ending"
        return self._ending

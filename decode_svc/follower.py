"""Tokens that leave in a Follow call, past the coroutines of their requests: with many streams, waking those costs most."""

import asyncio
from dataclasses import dataclass, field

from decode_svc.job import DecodeEvent, Drawn, Failed
from tandem.engine_thread import Mailbox
from tandem.errors import Reason, TandemError

_GONE = Failed(TandemError(Reason.STREAM_BROKEN, "the Follow call that carried this request's tokens has ended"))


@dataclass
class News:
    """Tokens that have not been sent yet, in order: plain ones as columns, those with log-probabilities (`rich`) as they are."""

    stream_numbers: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rich: list[tuple[int, Drawn]] = field(default_factory=list)

    def add_plain(self, stream_number: int, drawn: Drawn) -> None:
        self.stream_numbers.append(stream_number)
        self.indexes.append(drawn.index)
        self.token_ids.append(drawn.token.token_id)


class Follower:
    """A gateway that follows this worker. What it has not been sent yet piles up, so that who reads late gets fewer messages.

    `gone` means that nothing will be sent any more. Used on the event loop only.
    """

    def __init__(self, *, reads_plain_tokens: bool) -> None:
        self.gone = False
        self._reads_plain_tokens = reads_plain_tokens
        self._news = News()
        self._arrived = asyncio.Event()

    def add(self, stream_number: int, drawn: Drawn) -> None:
        if self._reads_plain_tokens and drawn.token.logprob is None:
            self._news.add_plain(stream_number, drawn)
        else:
            self._news.rich.append((stream_number, drawn))
        self._arrived.set()

    async def take(self) -> News:
        """All that is new, at least one token."""
        await self._arrived.wait()
        self._arrived.clear()
        news, self._news = self._news, News()
        return news


class FollowedStream:
    """Where the engine sends the events of a request whose tokens are followed; all but its tokens go to its own mailbox."""

    def __init__(self, follower: Follower, stream_number: int, mailbox: Mailbox[DecodeEvent]) -> None:
        self._follower = follower
        self._stream_number = stream_number
        self._mailbox = mailbox

    def put(self, event: DecodeEvent) -> None:
        if not isinstance(event, Drawn):
            self._mailbox.put(event)
        elif self._follower.gone:
            self._mailbox.put(_GONE)
        else:
            self._follower.add(self._stream_number, event)

"""A completion as it grows: tokens in, text out, until something ends it."""

import asyncio
from collections.abc import Sequence

from gateway.detokenizer import Detokenizer, TokenBytes
from gateway.job import FinishReason, GenerationJob, Output, Token
from gateway.pending import PendingOutput
from gateway.stop import StopMatcher
from tandem.errors import Reason, TandemError


class Completion:
    """Checks that tokens come without gap or repeat, makes text of them, and says when the completion has ended."""

    def __init__(self, job: GenerationJob, tokenizer: TokenBytes, pending: PendingOutput) -> None:
        self._stopping = job.stopping
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(job.stopping.stop_strings)
        self._pending = pending
        self._prompt: tuple[Token, ...] | None = None
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self._end_reached = asyncio.Event()
        self.finished: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def cut_short(self) -> bool:
        """Whether a stop string ended the completion, of which the workers know nothing."""
        return self._matcher.matched

    def give_prompt(self, logprobs: Sequence[Token]) -> None:
        """The prompt goes out with the next output."""
        self._prompt = tuple(logprobs)

    async def wait_finished(self) -> None:
        """Returns once something has ended the completion."""
        await self._end_reached.wait()

    async def room(self) -> None:
        """Returns once the client has taken enough of what is there."""
        await self._pending.room()

    def push(self, index: int, tokens: Sequence[Token]) -> None:
        """More tokens, the first of which is number `index`; those after the end are dropped. Raises INTERNAL on gap or repeat."""
        if index != self.num_tokens:
            raise TandemError(Reason.INTERNAL, f"the stream broke: token {index} came where {self.num_tokens} was due")
        output, self._prompt = Output(index, prompt=self._prompt), None
        for token in tokens:
            if self.finished is None:
                output.tokens.append(token)
                output.text += self._text_of(token.token_id)
        self._pending.add(output)
        if self.finished is not None:
            self._end_reached.set()

    def _text_of(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if token_id in self._stopping.end_token_ids:
            return self._end(FinishReason.STOP)
        text = self._shown(self._detokenizer.push(token_id))
        if self._matcher.matched:
            self.finished = FinishReason.STOP
        elif self.num_tokens >= self._stopping.max_tokens:
            text += self._end(FinishReason.LENGTH)
        return text

    def _shown(self, text: str) -> str:
        """Stop strings count from the text after min_tokens on."""
        return text if self.num_tokens <= self._stopping.min_tokens else self._matcher.push(text)

    def _end(self, reason: FinishReason) -> str:
        """The text that was held back."""
        text = self._shown(self._detokenizer.flush())
        self.finished = FinishReason.STOP if self._matcher.matched else reason
        return text + self._matcher.flush()

"""What an undisturbed run of a request gives, worked out without any of the product's code but its tokenizer and its stop rule."""

from dataclasses import dataclass

from tandem.api.v1 import generation_pb2
from tests.simulation.model import END_TOKEN, completion
from tests.simulation.scenario import Wish


@dataclass(frozen=True)
class Expected:
    """Tokens, text and reason of a whole completion."""

    tokens: list[int]
    text: str
    reason: int

    def begins(self, tokens: list[int], text: str) -> bool:
        return self.tokens[: len(tokens)] == tokens and self.text.startswith(text)

    def equals(self, tokens: list[int], text: str, reason: int) -> bool:
        return (self.tokens, self.text, self.reason) == (tokens, text, reason)


def expected(wish: Wish) -> Expected:
    ends = () if wish.ignore_eos else (END_TOKEN,)
    tokens = completion(wish.prompt, wish.max_tokens, wish.min_tokens, ends)
    for index in range(len(tokens) if wish.stop else 0):
        counted = text_of_all(tokens[wish.min_tokens : index + 1])
        found = min((at for stop in wish.stop if (at := counted.find(stop)) >= 0), default=None)
        if found is not None:
            shown = text_of_all(tokens[: wish.min_tokens]) + counted[:found]
            return Expected(tokens[: index + 1], shown, generation_pb2.FINISH_REASON_STOP)
    stopped = bool(tokens) and tokens[-1] in ends
    return Expected(
        tokens, text_of_all(tokens), generation_pb2.FINISH_REASON_STOP if stopped else generation_pb2.FINISH_REASON_LENGTH
    )


def text_of(token: int) -> str:
    """Of the byte-level vocabulary of random models: tokens below 3 are special."""
    return "" if token < 3 else chr(token - 3)


def text_of_all(tokens: list[int]) -> str:
    return "".join(map(text_of, tokens))

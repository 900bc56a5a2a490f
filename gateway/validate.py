"""Checks a GenerateRequest against generation.proto and turns it into plain values. Cheap: looks at no long text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gateway.job import OutputOptions, Sampling, Stopping
from gateway.served_model import ServedModel
from gateway.templates import Message
from tandem.api.v1 import generation_pb2
from tandem.errors import FieldViolation, Reason, TandemError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 256
MAX_LOGPROBS = 20
# Keeps the prompt's log-probabilities within a message of 4 MiB.
MAX_PROMPT_LOGPROBS = 200_000

_LARGEST_INT32 = 2**31 - 1
_ROLES = {
    generation_pb2.CHAT_ROLE_SYSTEM: "system",
    generation_pb2.CHAT_ROLE_USER: "user",
    generation_pb2.CHAT_ROLE_ASSISTANT: "assistant",
    generation_pb2.CHAT_ROLE_TOOL: "tool",
}
_DEFAULTS = Sampling()

Violations = Iterator[FieldViolation]


@dataclass(frozen=True)
class _Range:
    """The legal values of a number. NaN is in no range, since it compares as false."""

    low: float
    high: float
    low_included: bool = True

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and (self.low_included or value != self.low)

    def __str__(self) -> str:
        return f"{'[' if self.low_included else '('}{self.low:g}, {self.high:g}]"


_RANGES = {
    "temperature": _Range(0, 100),
    "top_k": _Range(0, _LARGEST_INT32),
    "top_p": _Range(0, 1, low_included=False),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 10, low_included=False),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
}


@dataclass(frozen=True)
class Prompt:
    """What to continue: exactly one of the three."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose fields are all legal. The prompt is not tokenized yet; without `max_tokens` there may be as many as fit."""

    prompt: Prompt
    sampling: Sampling
    seed: int | None
    max_tokens: int | None
    stopping: Stopping
    output: OutputOptions


def check_request(request: generation_pb2.GenerateRequest, model: ServedModel) -> CheckedRequest:
    """Raises UNKNOWN_MODEL, PROMPT_EMPTY, PROMPT_TOO_LONG, or INVALID_REQUEST / INVALID_SAMPLING with every field that is wrong."""
    model.check_name(request.model)
    prompt = _prompt(request, model)
    violations = [*_sampling(request.sampling), *_stopping(request.stopping, model), *_output(request.output)]
    if violations:
        raise _refused(violations)
    sampling = request.sampling
    stopping = request.stopping
    return CheckedRequest(
        prompt=prompt,
        sampling=replace(_DEFAULTS, **{name: getattr(sampling, name) for name in _RANGES if sampling.HasField(name)}),
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stopping=_stopping_values(stopping, model),
        output=_output_values(request.output),
    )


def check_length(num_tokens: int, checked: CheckedRequest, model: ServedModel, pool_tokens: int | None = None) -> Stopping:
    """The stopping rule with `max_tokens` filled in: by default what the context and the decode workers' `pool_tokens` hold.

    Raises PROMPT_EMPTY, PROMPT_TOO_LONG, or INVALID_REQUEST with the field.
    """
    if num_tokens == 0:
        raise TandemError(Reason.PROMPT_EMPTY, "the prompt has no tokens")
    room = model.context_tokens - num_tokens
    if room < 1:
        raise _too_long(f"the prompt has {num_tokens} tokens, which leaves no room in a context of {model.context_tokens}", model)
    max_tokens = _default_max_tokens(num_tokens, room, pool_tokens) if checked.max_tokens is None else checked.max_tokens
    violations = [*_length_violations(num_tokens, max_tokens, checked, model)]
    if violations:
        raise _refused(violations)
    return replace(checked.stopping, max_tokens=max_tokens)


def _default_max_tokens(num_tokens: int, room: int, pool_tokens: int | None) -> int:
    """A prompt that no pool holds keeps all of its room: the workers refuse it, and say why."""
    if pool_tokens is None or pool_tokens <= num_tokens:
        return room
    return min(room, pool_tokens - num_tokens)


def check_characters(num_characters: int, model: ServedModel, field: str) -> None:
    """Raises PROMPT_TOO_LONG if a text is too long for the context whatever its tokens are, without tokenizing it."""
    most = model.context_tokens * model.tokenizer.longest_token_characters
    if num_characters > most:
        raise _too_long(f"{num_characters} characters cannot fit a context of {model.context_tokens} tokens", model, field)


def check_token_ids(token_ids: tuple[int, ...], model: ServedModel, field: str) -> None:
    """Raises INVALID_REQUEST if an id is outside the vocabulary."""
    if token_ids and max(token_ids) >= model.vocabulary_size:
        raise _refused([FieldViolation(field, f"{max(token_ids)} is outside the vocabulary of {model.vocabulary_size} tokens")])


def check_messages(chat: generation_pb2.Chat, model: ServedModel, field: str) -> tuple[Message, ...]:
    """The turns of a conversation. Raises INVALID_REQUEST for unknown roles, or if the model has no template."""
    if model.template is None:
        raise _refused([FieldViolation(field, f"{model.name} has no chat template; send text or token_ids")])
    if len(chat.messages) > model.context_tokens:
        raise _too_long(f"{len(chat.messages)} messages cannot fit a context of {model.context_tokens} tokens", model, field)
    unknown = [number for number, message in enumerate(chat.messages) if message.role not in _ROLES]
    if unknown:
        described = "must be system, user, assistant or tool"
        raise _refused([FieldViolation(f"{field}.messages[{number}].role", described) for number in unknown[:8]])
    check_characters(sum(len(message.content) for message in chat.messages), model, field)
    return tuple(Message(_ROLES[message.role], message.content) for message in chat.messages)


def _prompt(request: generation_pb2.GenerateRequest, model: ServedModel) -> Prompt:
    match request.WhichOneof("input"):
        case "text" if request.text:
            check_characters(len(request.text), model, "text")
            return Prompt(text=request.text)
        case "token_ids" if request.token_ids.ids:
            return Prompt(token_ids=_given_tokens(request.token_ids, model))
        case "chat" if request.chat.messages:
            return Prompt(messages=check_messages(request.chat, model, "chat"))
        case field:
            violation = FieldViolation(field or "input", "must not be empty")
            raise TandemError(Reason.PROMPT_EMPTY, "the prompt is empty", violations=[violation])


def _given_tokens(message: generation_pb2.TokenIds, model: ServedModel) -> tuple[int, ...]:
    if len(message.ids) >= model.context_tokens:
        described = f"the prompt has {len(message.ids)} tokens, which leaves no room in a context of {model.context_tokens}"
        raise _too_long(described, model, "token_ids.ids")
    token_ids = tuple(message.ids)
    check_token_ids(token_ids, model, "token_ids.ids")
    return token_ids


def _sampling(message: generation_pb2.SamplingParams) -> Violations:
    for name, legal in _RANGES.items():
        if message.HasField(name) and getattr(message, name) not in legal:
            yield FieldViolation(f"sampling.{name}", f"{getattr(message, name)} is not in {legal}")


def _stopping(message: generation_pb2.StoppingParams, model: ServedModel) -> Violations:
    most = message.max_tokens if message.HasField("max_tokens") else model.context_tokens
    if not 1 <= most <= model.context_tokens:
        yield FieldViolation("stopping.max_tokens", f"{most} is not in [1, {model.context_tokens}]")
    elif not 0 <= message.min_tokens <= most:
        yield FieldViolation("stopping.min_tokens", f"{message.min_tokens} is not in [0, max_tokens]")
    if len(message.stop) > MAX_STOP_STRINGS:
        yield FieldViolation("stopping.stop", f"{len(message.stop)} texts are more than {MAX_STOP_STRINGS}")
    elif not all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in message.stop):
        yield FieldViolation("stopping.stop", f"each text must have 1 to {MAX_STOP_CHARACTERS} characters")
    if len(message.stop_token_ids) > MAX_STOP_TOKENS:
        yield FieldViolation("stopping.stop_token_ids", f"{len(message.stop_token_ids)} tokens are more than {MAX_STOP_TOKENS}")
    elif not all(token_id < model.vocabulary_size for token_id in message.stop_token_ids):
        yield FieldViolation("stopping.stop_token_ids", f"a token is outside the vocabulary of {model.vocabulary_size} tokens")


def _output(message: generation_pb2.OutputOptions) -> Violations:
    for name in ("logprobs", "prompt_logprobs"):
        if message.HasField(name) and not 0 <= getattr(message, name) <= MAX_LOGPROBS:
            yield FieldViolation(f"output.{name}", f"{getattr(message, name)} is not in [0, {MAX_LOGPROBS}]")


def _length_violations(num_tokens: int, max_tokens: int, checked: CheckedRequest, model: ServedModel) -> Violations:
    if num_tokens + max_tokens > model.context_tokens:
        described = f"{num_tokens} prompt tokens and {max_tokens} more exceed the context of {model.context_tokens}"
        yield FieldViolation("stopping.max_tokens", described)
    if checked.stopping.min_tokens > max_tokens:
        yield FieldViolation("stopping.min_tokens", f"{checked.stopping.min_tokens} is not in [0, {max_tokens}]")
    wanted = checked.output.num_prompt_logprobs
    if wanted is not None and num_tokens * (wanted + 1) > MAX_PROMPT_LOGPROBS:
        yield FieldViolation("output.prompt_logprobs", f"{wanted + 1} for each of {num_tokens} tokens exceed {MAX_PROMPT_LOGPROBS}")


def _stopping_values(message: generation_pb2.StoppingParams, model: ServedModel) -> Stopping:
    own = () if message.ignore_eos else model.end_token_ids
    return Stopping(
        max_tokens=0,
        min_tokens=message.min_tokens,
        stop_strings=tuple(message.stop),
        end_token_ids=frozenset({*own, *message.stop_token_ids}),
    )


def _output_values(message: generation_pb2.OutputOptions) -> OutputOptions:
    return OutputOptions(
        num_logprobs=message.logprobs if message.HasField("logprobs") else None,
        num_prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        echo=message.echo,
    )


def _refused(violations: list[FieldViolation]) -> TandemError:
    about_sampling = all(violation.field.startswith("sampling.") for violation in violations)
    reason = Reason.INVALID_SAMPLING if about_sampling else Reason.INVALID_REQUEST
    return TandemError(reason, "; ".join(f"{each.field}: {each.description}" for each in violations), violations=violations)


def _too_long(description: str, model: ServedModel, field: str = "input") -> TandemError:
    return TandemError(
        Reason.PROMPT_TOO_LONG,
        description,
        metadata={"context_tokens": str(model.context_tokens)},
        violations=[FieldViolation(field, description)],
    )

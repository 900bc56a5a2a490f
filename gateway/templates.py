"""Chat templates: Jinja programs from the model's files, run without trust."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import Reason, TandemError

# Largest output of a template, and most loop rounds and macro calls of one rendering: beyond any real conversation, and, at some
# 7 us a round, short enough for the event loop.
MAX_CHARACTERS = 8_000_000
MAX_ROUNDS = 5_000
MAX_ROUNDS_PER_MESSAGE = 20


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` as templates know it: system, user, assistant, tool."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template. Rendering is thread-safe. Raises ValueError if the source does not compile."""

    def __init__(self, source: str, begin_token: str = "", end_token: str = "") -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(_metered(environment.parse(source)))
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template does not compile: {error}") from error
        self._tokens = {"bos_token": begin_token, "eos_token": end_token}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The prompt's text. Raises TEMPLATE_FAILED if the template refuses, breaks, or goes on for too long."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._run(messages=turns, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
        except Exception as error:  # a template is a program: it may raise anything
            raise TandemError(Reason.TEMPLATE_FAILED, f"the chat template refused the conversation: {error}") from error

    def _run(self, **variables: Any) -> str:
        pieces: list[str] = []
        num_characters = 0
        meter = _Meter(MAX_ROUNDS + MAX_ROUNDS_PER_MESSAGE * len(variables["messages"]))
        for piece in self._template.generate(**variables, **self._tokens, **{_METER: meter}):
            num_characters += len(piece)
            if num_characters > MAX_CHARACTERS:
                raise SecurityError(f"it wrote more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)


_METER = "tandem_meter"


class _Meter:
    """Counts the rounds of one rendering."""

    def __init__(self, max_rounds: int) -> None:
        self._rounds_left = max_rounds

    def __call__(self) -> None:
        self._rounds_left -= 1
        if self._rounds_left < 0:
            raise SecurityError("its loops go on for too long")


def _metered(template: nodes.Template) -> nodes.Template:
    """Lets every round of a loop count itself: a sandbox bounds range(), not loops within loops."""
    blocks: list[nodes.For | nodes.Macro] = [*template.find_all(nodes.For), *template.find_all(nodes.Macro)]
    for block in blocks:
        count = nodes.ExprStmt(nodes.Call(nodes.Name(_METER, "load"), [], [], None, None))
        block.body.insert(0, count.set_lineno(block.lineno))
    return template


class _Environment(ImmutableSandboxedEnvironment):
    """Also refuses operators that make huge values of small ones."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        small = numbers and abs(left) < 2**63 and abs(right) < (64 if operator == "**" else 2**63)
        if not small and not (operator == "%" and isinstance(left, str) and len(left) < 64):
            raise SecurityError(f"operator {operator} of large values or texts")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """As chat templates expect it: no HTML escapes, which Jinja's own filter makes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)

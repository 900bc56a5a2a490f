"""Prompts to tokens: on the event loop if short, in a thread if long."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from gateway.served_model import ServedModel
from gateway.templates import Message
from gateway.validate import Prompt, check_characters
from tandem.errors import Reason, TandemError

# Some 2 ms of tokenizing; a hop to a thread and back costs 0.1 ms.
SHORT_CHARACTERS = 4096

T = TypeVar("T")


async def prompt_tokens(prompt: Prompt, model: ServedModel) -> Sequence[int]:
    """The prompt's tokens. Raises TEMPLATE_FAILED or PROMPT_TOO_LONG."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    if prompt.text is not None:
        return await tokenize(prompt.text, model, add_special_tokens=True)
    text = await render(prompt.messages or (), model, add_generation_prompt=True)
    return await tokenize(text, model, add_special_tokens=False)


async def tokenize(text: str, model: ServedModel, *, add_special_tokens: bool) -> list[int]:
    return await _run(len(text), lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens))


async def detokenize(token_ids: Sequence[int], model: ServedModel, *, skip_special_tokens: bool) -> str:
    return await _run(len(token_ids), lambda: model.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


async def render(messages: Sequence[Message], model: ServedModel, *, add_generation_prompt: bool) -> str:
    """The conversation's text. Raises TEMPLATE_FAILED, or PROMPT_TOO_LONG by the number of characters."""
    template = model.template
    if template is None:
        raise TandemError(Reason.INVALID_REQUEST, f"{model.name} has no chat template")
    num_characters = sum(len(message.content) for message in messages) + 64 * len(messages)
    text = await _run(num_characters, lambda: template.render(messages, add_generation_prompt=add_generation_prompt))
    check_characters(len(text), model, "chat")
    return text


async def _run(length: int, work: Callable[[], T]) -> T:
    """`length`: characters, or tokens."""
    return work() if length <= SHORT_CHARACTERS else await asyncio.to_thread(work)

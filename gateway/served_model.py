"""What the gateway knows of the model that it serves: tokenizer, template, sizes. No weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.gguf_conversion import converted_directory
from gateway.templates import ChatTemplate
from gateway.tokenizer import Tokenizer, byte_level_tokenizer, load_tokenizer
from tandem.errors import Reason, TandemError
from tandem.models import ModelError, ModelFiles

# Random models answer chats too, so that everything can be tried without a download.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class ServedModel:
    """A model by name and digest. `context_tokens` bounds prompt and completion together; `end_token_ids` end a completion."""

    name: str
    digest: str
    tokenizer_digest: str
    context_tokens: int
    vocabulary_size: int
    end_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def check_name(self, name: str) -> None:
        """Raises UNKNOWN_MODEL unless `name` is this model's, or empty."""
        if name and name != self.name:
            message = f"model {name[:100]!r} is not served here; {self.name!r} is"
            raise TandemError(Reason.UNKNOWN_MODEL, message, metadata={"model": name})


def load_served_model(files: ModelFiles, cache: Path) -> ServedModel:
    """Reads tokenizer and sizes of a model that is on this machine; converted tokenizers are kept below `cache`.

    Blocks for about a second, the first time for more. Raises ModelError if the model lacks something or is of an unsupported kind.
    """
    if files.random_config is not None:
        return _model(files, files.random_config, byte_level_tokenizer(), ChatTemplate(_PLAIN_TEMPLATE))
    assert files.path is not None, "only random models have no files"
    directory = files.path if files.format == "huggingface" else converted_directory(files.path, files.digest, cache)
    config = _json(directory / "config.json") | _generation_config(directory)
    return _model(files, config, load_tokenizer(directory), _template(directory))


def _model(files: ModelFiles, config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> ServedModel:
    try:
        context_tokens, vocabulary_size = int(config["max_position_embeddings"]), int(config["vocab_size"])
    except KeyError as error:
        raise ModelError(f"the config of {files.name} lacks {error}") from error
    ends = _end_token_ids(config.get("eos_token_id"))
    return ServedModel(files.name, files.digest, files.tokenizer_digest, context_tokens, vocabulary_size, ends, tokenizer, template)


def _end_token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    return tuple(sorted({number for number in ids if number is not None}))


def _generation_config(directory: Path) -> dict[str, Any]:
    """End tokens as the model's makers want them for generation, which go before those of its config."""
    path = directory / "generation_config.json"
    found = _json(path).get("eos_token_id") if path.is_file() else None
    return {} if found is None else {"eos_token_id": found}


def _template(directory: Path) -> ChatTemplate | None:
    path = directory / "tokenizer_config.json"
    config = _json(path) if path.is_file() else {}
    source = _template_source(directory, config)
    if source is None:
        return None
    try:
        return ChatTemplate(source, _token(config.get("bos_token")), _token(config.get("eos_token")))
    except ValueError as error:
        raise ModelError(f"{directory}: {error}") from error


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, or tokenizer_config.json, where several are a list of names and templates."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found


def _token(value: str | Mapping[str, Any] | None) -> str:
    """A special token's text, which some files wrap in an object."""
    return value.get("content", "") if isinstance(value, Mapping) else value or ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}

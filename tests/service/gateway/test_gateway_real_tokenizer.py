"""The real model's tokenizer and template, converted from its file, against the reference."""

import json
import os
import random
from pathlib import Path

import pytest

from gateway.detokenizer import Detokenizer
from gateway.served_model import ServedModel, load_served_model
from gateway.templates import Message
from tandem.models import DEFAULT_MODEL, ModelError, cache_directory, resolve_model

pytestmark = pytest.mark.system

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs.",
    "Übergrößenträger, naïve façade, Ægir, ﬁne",
    "你好，世界！ こんにちは世界 안녕하세요 세계",  # noqa: RUF001
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202eright to left\u202c",
    "①②③ ٣٤٥ Ⅷ ½ 𝟜 1234567890",  # noqa: RUF001
    "def f(x):\n\treturn x  # two\n\n\n    indented\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "\0\x01\x7f\ufeff \u00a0\u2003|",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    try:
        files = resolve_model(os.environ.get("TANDEM_TEST_MODEL", DEFAULT_MODEL), download=False)
    except ModelError as error:
        pytest.skip(f"{error} (cache: {cache_directory()})")
    return load_served_model(files, tmp_path_factory.mktemp("cache"))


def test_prompts_equal_the_reference(model: ServedModel, repository: Path) -> None:
    reference = json.loads((repository / "tests/data/smollm2_greedy.json").read_text())
    assert model.template is not None
    for prompt in reference["prompts"]:
        messages = [Message(message["role"], message["content"]) for message in prompt["messages"]]
        text = model.template.render(messages, add_generation_prompt=True)
        assert text == prompt["prompt_text"]
        assert model.tokenizer.encode(text, add_special_tokens=False) == prompt["prompt_ids"]


def test_sizes(model: ServedModel) -> None:
    assert (model.context_tokens, model.vocabulary_size, model.end_token_ids) == (8192, 49152, (2,))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(model: ServedModel, text: str) -> None:
    token_ids = model.tokenizer.encode(text, add_special_tokens=True)
    assert model.tokenizer.decode(token_ids, skip_special_tokens=False) == text
    pieces = [model.tokenizer.token_bytes(token_id) for token_id in token_ids]
    assert b"".join(pieces) == text.encode()


def test_random_tokens_in_pieces_equal_the_librarys_text(model: ServedModel) -> None:
    chooser = random.Random(7)
    for _ in range(200):
        token_ids = [chooser.randrange(model.vocabulary_size) for _ in range(chooser.randrange(1, 60))]
        detokenizer = Detokenizer(model.tokenizer)
        pieces = [*map(detokenizer.push, token_ids), detokenizer.flush()]
        assert "".join(pieces) == model.tokenizer._library.decode(token_ids, skip_special_tokens=True)

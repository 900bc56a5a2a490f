"""Chat templates: what real ones use works, and what none should do is refused."""

import json
import time

import pytest

from gateway.templates import ChatTemplate, Message
from tandem.errors import Reason, TandemError

MESSAGES = [Message("user", "hi"), Message("assistant", "<b> ü"), Message("user", "bye")]


def render(source: str, *, add_generation_prompt: bool = True) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(MESSAGES, add_generation_prompt=add_generation_prompt)


def test_what_templates_use() -> None:
    source = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% continue %}
    {% endif %}
[{{ message.role }}] {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt and not tools %}
[assistant]
{%- endif %}"""
    assert render(source) == "<s>[user] hi</s>\n[user] bye</s>\n[assistant]"
    assert not render(source, add_generation_prompt=False).endswith("[assistant]")


def test_json_is_not_escaped_for_pages() -> None:
    assert render("{{ messages[1] | tojson }}") == '{"role": "assistant", "content": "<b> ü"}'
    assert json.loads(render("{{ messages | tojson(indent=2) }}"))[2] == {"role": "user", "content": "bye"}


def test_dates_and_variables() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert (
        render("{% set state = namespace(n=0) %}{% for m in messages %}{% set state.n = state.n + 1 %}{% endfor %}{{ state.n }}")
        == "3"
    )
    assert render("{{ 3 * 4 }} {{ 2 ** 3 }} {{ 7 % 4 }} {{ '%s!' % 'a' }}") == "12 8 3 a!"
    assert render("{% if (loop_index or 0) % 2 == 0 %}even{% endif %}") == "even"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ range(1000000000) | list }}",
        "{{ undefined_thing.field }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}",
        "{% include 'secrets' %}",
    ],
)
def test_refusals_failures_and_bombs_are_template_errors(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(TandemError) as raised:
        render(source)
    assert raised.value.reason is Reason.TEMPLATE_FAILED
    assert time.monotonic() - began < 2


def test_a_template_that_does_not_compile_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_a_template_sees_the_messages_and_cannot_keep_state() -> None:
    template = ChatTemplate("{% set x = x | default(0) + 1 %}{{ x }}")
    assert [template.render([], add_generation_prompt=True) for _ in range(2)] == ["1", "1"]

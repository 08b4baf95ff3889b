"""Chat templates give what `transformers` gives, in a sandbox, with clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from frontend.request import ChatRequest
from frontend.template import ChatTemplate, TemplateError

CHATML = (
    "{%- if tools %}{{ '<|tools|>' }}\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' }}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {%- generation %}{{ message.content }}{% endgeneration %}\n"
    "    {%- else %}{{ message.content | trim }}{% endif %}\n"
    "    {{- '<|im_end|>\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{%- if thinking %}{{ '<think>' }}{% endif %}{{ eos_token }}"
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "2 < 3 & 'ä' in \"図\"?"},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "skip", "content": "x"},
    {"role": "user", "content": "<b>Why</b>?"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"a": [1, None, True]}}}]


def by_transformers(source: str, **given: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[MESSAGES], chat_template=source, **given)
    return str(rendered[0])


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"thinking": True}])
def test_text_is_that_of_transformers(
    tools: list[dict[str, Any]] | None, prompt: bool, kwargs: dict[str, Any]
) -> None:
    template = ChatTemplate(CHATML, {"eos_token": "</s>"})
    text = template.render(MESSAGES, tools=tools, add_generation_prompt=prompt, kwargs=kwargs)
    assert text == by_transformers(
        CHATML, tools=tools, add_generation_prompt=prompt, eos_token="</s>", **kwargs
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxx{% endfor %}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.there }}",
        "{{ 1 / 0 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(MESSAGES)
    assert MESSAGES[0]["role"] == "system"


def test_the_templates_own_refusal_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateError, match="roles must alternate"):
        template.render(MESSAGES)


def test_a_request_cannot_replace_its_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", {})
    text = template.render(MESSAGES, kwargs={"messages": [], "add_generation_prompt": "no"})
    assert text == "5True"


def test_a_models_folder(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = {
        "chat_template": "{{ bos_token }}{{ messages[0].role }}",
        "bos_token": {"content": "<s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(MESSAGES) == "<s>system"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    own_file = ChatTemplate.load(tmp_path)
    assert own_file is not None
    assert own_file.render(MESSAGES) == "5"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_no_jinja_is_named() -> None:
    with pytest.raises(TemplateError, match="no Jinja"):
        ChatTemplate("{% for x %}", {})


def test_what_the_template_is_told_besides_the_messages() -> None:
    given = {
        "messages": [],
        "reasoning_effort": "none",
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"more": 1},
    }
    told = {"documents": [{"title": "t"}], "reasoning_effort": "none", "enable_thinking": False}
    assert msgspec.convert(given, ChatRequest).template_kwargs == {**told, "more": 1}
    given["chat_template_kwargs"] = {"enable_thinking": True}
    assert msgspec.convert(given, ChatRequest).template_kwargs == {**told, "enable_thinking": True}

from __future__ import annotations

from typing import Any

import pytest

from preft.core.errors import ConfigError, InvalidRequest
from preft.gateway.bodies.messages import Message
from preft.gateway.text.chat_template import ChatTemplate
from preft.gateway.text.tokenizer import Tokenizer
from support import small_tokenizers

TALK = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "hello the"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"})


def rendered_by(tokenizer: Tokenizer, **options: Any) -> str:
    assert tokenizer.chat_prompt is not None
    return tokenizer.chat_prompt.render([Message(role="user", content="hi")], **options)


def test_a_conversation():
    rendered = template(small_tokenizers.CHAT_TEMPLATE).render(TALK)
    assert rendered == "<s><|user|>hi<|eot|><|assistant|>hello the<|eot|><|assistant|>"
    without = template(small_tokenizers.CHAT_TEMPLATE).render(TALK, add_generation_prompt=False)
    assert without == "<s><|user|>hi<|eot|><|assistant|>hello the"


@pytest.mark.parametrize(("trim", "end"), [("", "hello the "), (" | trim", "hello the")])
def test_continuing_the_final_message(trim, end):
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content" + trim + " }}[end]{% endfor %}"
    talk = [TALK[0], {"role": "assistant", "content": "hello the "}]
    rendered = template(source).render(talk, add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith(f"[end][assistant]{end}")
    assert talk[1]["content"] == "hello the "
    with pytest.raises(InvalidRequest):
        template("nothing").render(talk, continue_final_message=True)


def test_hugging_face_conventions():
    source = """\
{% for m in messages %}
    {% if loop.index > 1 %}{% break %}{% endif %}
    {% generation %}{{ m.content | tojson }}{% endgeneration %}
{% endfor %}
{{ strftime_now('%Y') | length }} {{ tools is none }} {{ mood }}"""
    talk = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "no"}]
    assert template(source).render(talk, variables={"mood": "calm"}) == '"<é>"4 True calm'


def test_what_a_template_refuses_is_the_callers_error():
    with pytest.raises(InvalidRequest, match="refused") as caught:
        template(small_tokenizers.CHAT_TEMPLATE).render([{"role": "user", "content": "refuse me"}])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest):
        template("{{ messages[0].content + 1 }}").render(TALK)
    with pytest.raises(InvalidRequest) as caught:
        template("x").render(TALK, variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_templates_are_sandboxed():
    with pytest.raises(InvalidRequest):
        template("{{ messages.append(1) }}").render(list(TALK))
    with pytest.raises(InvalidRequest):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(TALK)


def test_an_invalid_template_is_a_set_up_error(tmp_path):
    with pytest.raises(ConfigError, match="chat template"):
        template("{% if %}")
    folder = small_tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text("from the file {{ messages[0].content }}")
    loaded = Tokenizer.load(folder)  # the file wins over tokenizer_config.json
    assert rendered_by(loaded) == "from the file hi"


def test_named_templates_in_the_tokenizer_config(tmp_path):
    named = [{"name": name, "template": name + " {{ messages[0].content }}"} for name in ("tool_use", "default")]
    loaded = Tokenizer.load(small_tokenizers.byte_level(tmp_path, chat_template=named))  # type: ignore[arg-type]
    assert rendered_by(loaded) == "default hi"
    assert rendered_by(loaded, tools=[{}]) == "tool_use hi"
    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("a file {{ messages[0].content }}")
    assert rendered_by(Tokenizer.load(tmp_path), tools=[{}]) == "a file hi"
    assert rendered_by(Tokenizer.load(tmp_path)) == "default hi"

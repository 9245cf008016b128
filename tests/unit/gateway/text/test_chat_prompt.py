from __future__ import annotations

from typing import Any

import pytest

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.messages import Message
from preft.gateway.text.chat_prompt import ChatPrompt

PARTS_ONLY = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}


def prompt(template: str, **more: str) -> ChatPrompt:
    return ChatPrompt({"default": template, **more}, {})


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    return prompt(template).render([Message.model_validate(message) for message in messages], **options)


def says(role: str, *texts: str) -> dict[str, Any]:
    """A message; several texts are parts."""
    return {"role": role, "content": texts[0] if len(texts) == 1 else [{"type": "text", "text": t} for t in texts]}


def left_out(template: str, *messages: dict[str, Any], **options: Any) -> str | None:
    with pytest.raises(InvalidRequest, match="out of the prompt") as caught:
        render(template, *messages, **options)
    return caught.value.param


@pytest.mark.parametrize(
    ("template", "text", "parts"),
    [
        (PARTS_ONLY, "<system>be<user>hi", "<system>ab<user>cd"),
        (CHATML, "<system>be<user>hi", "<system>a\nb<user>c\nd"),
        # By position, so that a second part would be lost.
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}",
            "<system>be<user>hi",
            "<system>a\nb<user>c\nd",
        ),
        # Strings alone for the system message, parts alone for users.
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}{% else %}"
            "{% for c in m.content %}{% if c.type == 'text' %}|{{ c.text }}{% else %}{{ raise_exception('no') }}"
            "{% endif %}{% endfor %}{% endif %}{% endfor %}",
            "be|hi",
            "a\nb|c|d",
        ),
        # Through a macro, which only a rendering shows.
        (
            "{% macro show(x) %}{% for c in x %}{{ c.text }},{% endfor %}{% endmacro %}"
            "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}",
            "<system>be,<user>hi,",
            "<system>a,b,<user>c,d,",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
            "{% else %}{{ m.content | map(attribute='text') | join('+') }}{% endif %}{% endfor %}",
            "<system>be<user>hi",
            "<system>a+b<user>c+d",
        ),
    ],
)
def test_content_comes_in_the_form_that_the_template_takes(template, text, parts):
    assert render(template, says("system", "be"), says("user", "hi")) == text
    assert render(template, says("system", "a", "b"), says("user", "c", "d")) == parts


@pytest.mark.parametrize(
    ("template", "talk", "param"),
    [
        # Roles alone; the text is that of a role.
        ("{% for m in messages %}<{{ m.role }}>{% endfor %}", [says("user", "user")], "messages[0].content"),
        # System messages that aren't first.
        (
            "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}",
            [says("user", "hi"), says("system", "s"), says("user", "again")],
            "messages[1].content",
        ),
        # Only the last message.
        ("{{ messages[-1].content }}", [says("user", "a"), says("user", "a")], "messages[0].content"),
        # A beginning, an end.
        ("{{ messages[0].content[:5] }}", [says("user", "0123456789")], "messages[0].content"),
        ("{{ messages[0].content[5:] }}", [says("user", "0123456789")], "messages[0].content"),
        # Tool results and calls.
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
            [says("user", "a"), {"role": "assistant", "tool_calls": [CALL]}, says("tool", "42")],
            "messages[2].content",
        ),
        (CHATML, [says("user", "a"), {"role": "assistant", "tool_calls": [CALL]}], "messages[1].tool_calls"),
        (CHATML.replace("m.content", "m.content.split('.')[0]"), [says("assistant", "a. b.")], "messages[0].content"),
    ],
)
def test_a_text_that_is_not_in_the_prompt_is_an_error(template, talk, param):
    assert left_out(template, *talk) == param


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("m.content | trim", "a\nB"),
        ("m.content | upper", "  A\nB "),
        ("m.content | tojson", '"  a\\nB "'),
        ("m.content | e", "  a\nB "),
        ("m.content.replace('B', 'c')", "  a\nc "),
        ("m.content.split() | join(' ')", "a B"),
        ("m.content + m.content", "  a\nB   a\nB "),
    ],
)
def test_a_text_that_the_template_changes_is_no_error(change, shown):
    assert render(CHATML.replace("m.content", change), says("user", "  a\nB ")) == f"<user>{shown}"


def test_empty_texts_need_not_be_shown():
    template = "{% for m in messages %}{% if m.content | trim %}{{ m.content }}{% endif %}{% endfor %}"
    assert (
        render(template, says("system", " \n"), says("user", "hi"), says("assistant", ""), says("user", "x")) == "hix"
    )


REASONING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_reasoning_of_earlier_turns_may_be_left_out():
    thought = says("assistant", "<think>hm</think> yes")
    assert render(REASONING, says("user", "a"), thought, says("user", "b")) == "<user>a<assistant>yes<user>b"
    assert left_out(REASONING.replace("'assistant'", "'user'"), says("user", "a</think>b"), thought) == (
        "messages[0].content"
    )


def test_words_beside_tool_calls_may_be_left_out():
    template = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"  # noqa: E501
    call = '[{"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}]'
    assert render(template, says("user", "a"), {**says("assistant", "let me"), "tool_calls": [CALL]}) == f"a{call}"


def test_a_template_that_looks_at_the_texts():
    """Where marked texts are refused, the texts themselves are looked for."""
    template = (
        "{% for m in messages %}{% if m.content | length > 9 %}{{ raise_exception('long') }}{% endif %}"
        "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert render(template, says("user", "hi")) == "hi"
    assert left_out(template, says("system", "be"), says("user", "hi")) == "messages[0].content"


SHORT_ALONE = (
    "{% for m in messages %}{% if m.content | length > 9 %}{{ raise_exception('long') }}{% endif %}"
    "<{{ m.role }}>{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("text", ["a", "banana", "ban", "user", "1", "?", "\N{THUMBS UP SIGN}", "é", "zz Z", "system"])
def test_a_lost_text_is_not_found_inside_another_or_in_the_templates_own_words(text):
    others = [says("user", text), says("assistant", "banana 1?"), says("user", "aba"), says("user", text)]
    assert render(SHORT_ALONE, *others) == f"<user>{text}<assistant>banana 1?<user>aba<user>{text}"
    for at in range(len(others) + 1):
        talk = [*others[:at], says("system", text), *others[at:]]
        assert left_out(SHORT_ALONE, *talk) == f"messages[{at}].content"


def test_every_text_needs_a_place_of_its_own_in_a_prompt_without_marks():
    last = "{% if messages[0].content | length > 9 %}{{ raise_exception('long') }}{% endif %}{{ messages[-1].content }}"
    assert left_out(last * 2, says("user", "a"), says("user", "a")) == "messages[0].content"
    assert render(last * 2, says("user", "a")) == "aa"


def test_a_template_for_nothing_but_the_given_texts():
    template = "{% if messages[0].content != 'yes' %}{{ raise_exception('no') }}{% endif %}yes"
    with pytest.raises(InvalidRequest, match="depends on the texts") as caught:
        render(template, says("user", "yes"))
    assert caught.value.param == "messages"


def test_developers_where_the_template_knows_none():
    developer, system, user = says("developer", "dev"), says("system", "sys"), says("user", "hi")
    assert render(CHATML, developer, user) == "<system>dev<user>hi"
    assert render(CHATML, system, user, developer, user) == "<system>sys\n\ndev<user>hi<user>hi"
    assert render(PARTS_ONLY, says("developer", "a", "b"), system, user) == "<system>a\nb\n\nsys<user>hi"
    knows = CHATML + "{# 'developer' #}"
    assert render(knows, system, user, developer, user) == "<system>sys<user>hi<developer>dev<user>hi"
    assert left_out("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", developer, user) == (
        "messages[0].content"
    )


def test_no_content_beside_calls_is_an_empty_text():
    template = "{% for m in messages %}[{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}]{% endfor %}"  # noqa: E501
    for content in ({}, {"content": None}, {"content": []}, {"content": ""}):
        assert (
            render(template, says("user", "a"), {"role": "assistant", "tool_calls": [CALL], **content}) == "[a][look]"
        )
        assert render(template, says("user", "a"), {"role": "assistant", **content}) == "[a][]"


def test_calls_that_show_only_without_content():
    template = (
        "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert render(template, says("user", "a"), calling) == 'alook{"at": "é"}'


def test_what_a_template_sees_beside_content():
    template = (
        "{% for m in messages %}{{ m.content }}({{ m.name }},{{ m.reasoning }},{{ m.reasoning_content }},"
        "{{ m.tool_call_id }},{{ m.id }},{{ m.refusal }}){% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
        "{% endfor %}"
    )
    user = {**says("user", "a"), "name": "ann"}
    assert render(template, user) == "a(ann,,,,,)"
    assert render(template, user, {**says("assistant", "b"), "reasoning_content": "hm", "id": "1"})[11:] == (
        "b(,hm,hm,,,)"
    )
    assert render(template, user, {"role": "assistant", "refusal": "I won't."})[11:] == "I won't.(,,,,,)"
    result = {"role": "tool", "tool_call_id": "c1", "content": "42", "name": "look"}
    assert render(template, user, {"role": "assistant", "tool_calls": [CALL]}, result)[11:] == (
        "(,,,,,)look42(look,,,c1,,)"
    )


def test_tools_have_a_template_of_their_own_where_the_model_has_one():
    both = prompt(CHATML, tool_use="{{ tools[0].name }}" + CHATML)
    hello = [Message.model_validate(says("user", "hi"))]
    assert both.render(hello, tools=[{"name": "look"}]) == "look<user>hi"
    assert both.render(hello, tools=[]) == "<user>hi"


def test_documents_need_a_template_that_reads_them():
    documents = [{"text": "fact"}]
    reads = "{% for d in documents %}{{ d.text }}{% endfor %}" + CHATML
    assert render(reads, says("user", "hi"), documents=documents) == "fact<user>hi"
    assert render(CHATML, says("user", "hi"), documents=[]) == "<user>hi"
    with pytest.raises(InvalidRequest) as caught:
        render(CHATML, says("user", "hi"), documents=documents)
    assert caught.value.param == "documents"


def test_reasoning_effort_is_a_variable_of_the_template():
    effort = CHATML + "({{ reasoning_effort }})"
    thinks = CHATML + "({{ enable_thinking }})"
    hi = says("user", "hi")
    assert render(effort, hi, reasoning_effort="low") == "<user>hi(low)"
    assert render(thinks, hi, reasoning_effort="low") == "<user>hi(True)"
    assert render(thinks, hi, reasoning_effort="none") == "<user>hi(False)"
    assert render(thinks, hi, reasoning_effort="low", variables={"enable_thinking": False}) == "<user>hi(False)"
    assert render(effort, hi) == "<user>hi()"
    assert render(CHATML, hi, reasoning_effort="none") == "<user>hi"
    with pytest.raises(InvalidRequest) as caught:
        render(CHATML, hi, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize("template", [CHATML, PARTS_ONLY, REASONING])
def test_continuing_needs_the_whole_final_message(template):
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert render(template, says("user", "a"), says("assistant", "b "), **options).endswith("<assistant>b ")
    assert render(template, says("user", "a"), says("assistant", "b", "c"), **options).endswith("c")
    cuts = template.replace(" and not loop.last", "")
    if cuts != template:
        assert left_out(cuts, says("user", "a"), says("assistant", "<think>x</think>b"), **options) == (
            "messages[1].content"
        )
    calling = {"role": "assistant", "tool_calls": [CALL]}
    with pytest.raises(InvalidRequest):
        render(template, says("user", "a"), calling, **options)


def test_depth_without_end_is_the_callers_error():
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest):
        render("{{ deep | tojson }}" + CHATML, says("user", "hi"), variables={"deep": deep})

"""Outputs that are either calls in the model's own form or a text: read the same wherever they are cut."""

from __future__ import annotations

import random

import pytest

from preft.gateway.text.choice_reader import joined_calls
from preft.gateway.text.parsing import CallTag, Parts
from preft.gateway.text.tagged_calls import MAX_SPACE, TaggedCalls

MARKED = tuple(
    CallTag(name, f'<tool_call>{line}{{"name": "{name}", "arguments": ', {}, f"}}{line}</tool_call>")
    for name in ("look", "look_up")
    for line in ("\n", "")
)
PLAIN = tuple(CallTag(name, f'{{"name": "{name}", "parameters": ', {}, "}") for name in ("look", "look_up"))
TRICKY = '{"a": "}\\n</tool_call>\\"{", "b": [{}, "é€"]}'


def pieces_of(text: str) -> list[list[str]]:
    """Whole, character by character, in two at every place, and in random pieces."""
    draw = random.Random(text)
    cuts = [[], [*range(1, len(text))], *([place] for place in range(1, len(text)))]
    cuts += [sorted(draw.sample(range(1, len(text)), min(4, len(text) - 1))) for _ in range(20)]
    return [[text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)] for cut in cuts]


def read(tags: tuple[CallTag, ...], pieces: list[str]) -> Parts:
    reader, parts = TaggedCalls(tags, lambda name, position: f"{name}-{position}"), Parts()
    for number, piece in enumerate(pieces, start=1):
        parts = parts.then(reader.push(piece, finished=number == len(pieces)))
    return parts


@pytest.mark.parametrize(
    ("tags", "text", "calls"),
    [
        (MARKED, f'<tool_call>\n{{"name": "look", "arguments": {TRICKY}}}\n</tool_call>', [("look", TRICKY)]),
        (
            MARKED,
            '<tool_call>{"name": "look_up", "arguments": {}}</tool_call>\n'
            '<tool_call>\n{"name": "look", "arguments": {"b":2}}\n</tool_call>',
            [("look_up", "{}"), ("look", '{"b":2}')],
        ),
        (PLAIN, f'{{"name": "look", "parameters": {TRICKY}}}', [("look", TRICKY)]),
        (
            PLAIN,
            '{ "name":"look_up" , "parameters" :{} } ; {"name": "look","parameters":\n{"b": 2}}',
            [("look_up", "{}"), ("look", '{"b": 2}')],
        ),
        (PLAIN, '{"name": "look", "parameters": {"cut', [("look", '{"cut')]),
        (MARKED, '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>\n<tool_c', [("look", "{}")]),
    ],
)
def test_calls(tags, text, calls):
    for pieces in pieces_of(text):
        parts = read(tags, pieces)
        found = joined_calls(list(parts.tool_calls))
        assert [(call.name, call.arguments) for call in found] == calls, pieces
        assert [call.id for call in found] == [f"{name}-{number}" for number, (name, _) in enumerate(calls)]
        assert parts.content == ""


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        (MARKED, '{"a": "<tool_call>\\n{\\"name\\": \\"look\\", \\"arguments\\": {}}"}'),
        (MARKED, '\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'),
        (MARKED, "<tool_call>\n{}"),
        (MARKED, '<tool_call>\n{"name": "look", "argu'),
        (PLAIN, '{"name": "look", "age": 3, "x": {"name": "look", "parameters": {}}}'),
        (PLAIN, '{"name": "lo"}'),
        (PLAIN, '[{"name": "look", "parameters": {}}]'),
        (PLAIN, " yes"),
    ],
)
def test_all_other_texts_stay_as_they_are(tags, text):
    for pieces in pieces_of(text):
        assert read(tags, pieces) == Parts(text), pieces


def test_text_comes_as_soon_as_it_is_no_call():
    reader = TaggedCalls(PLAIN, lambda name, position: "")
    assert [reader.push(piece, finished=False).content for piece in ('{"', "na", 'mes": ', "1", "}")] == [
        *("", ""), '{"names": ', "1", "}",
    ]  # fmt: skip


def test_endless_space_is_text():
    reader = TaggedCalls(PLAIN, lambda name, position: "")
    assert reader.push("{" + " " * (2 * MAX_SPACE), finished=False).content.startswith("{ ")

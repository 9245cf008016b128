"""Structural tags as Lark grammars of llguidance: free text with tagged JSON, and tool calls beside another form.

Owns the rules' text. `grammar` compiles, and gives schemas their options.

A mark is an added token that llguidance never spells with ordinary tokens, such as `<tool_call>` in Qwen's tokenizers.
Where a literal has a mark, its token must come: models write the mark so, and llguidance's string literals don't
accept it. Tokenizers without the mark spell it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Marks = Mapping[str, int]  # their token ids

_HEADER = "%llguidance {}\n"
_ANYTHING = r"(.|\n)*"


@dataclass(frozen=True, slots=True)
class Tag:
    """JSON of a schema between two literals. `trigger` begins `begin`; it's empty if calls alone may come."""

    begin: str
    schema: Mapping[str, Any]
    end: str
    trigger: str = ""


def text_with_tags(tags: Sequence[Tag], marks: Marks) -> str:
    """Free text in which a trigger must be followed by the rest of one of its tags. Raises ValueError."""
    if not tags or not all(tag.trigger for tag in tags):
        raise ValueError("a structural tag needs structures and triggers")
    rules = [f"start: ({' | '.join(f'tag_{number}' for number in range(len(tags)))})* rest"]
    rules += ["rest: TEXT", f"TEXT: /{_ANYTHING}/"]
    for number, tag in enumerate(tags):
        content = f"%json {json.dumps(tag.schema)} {_literal(tag.end, marks)}"
        pieces = _split(tag.trigger, marks)
        if pieces[0] in marks:
            trigger, rest = f"TEXT {_literal(pieces[0], marks)}", tag.begin[len(pieces[0]) :]
        else:
            rules.append(f"trigger_{number}[lazy]: TEXT {json.dumps(tag.trigger)}")
            trigger, rest = f"trigger_{number}", tag.begin[len(tag.trigger) :]
        rules.append(f"tag_{number}: {trigger} {_literal(rest, marks)} {content}")
    return _HEADER + "\n".join(rules) + "\n"


def calls_or_form(calls: Sequence[Tag], *, several: bool, form: Sequence[str], marks: Marks) -> str:
    """Either calls alone, or the form: rules for `form`, the first of which is its start. See `form_rules`."""
    rules = ["start: calls | form"]
    rules.append("calls: call (SEPARATOR? call)*" if several else "calls: call")
    rules.append(r"SEPARATOR: /; ?|\n/")  # what Llama's and Qwen's models write between two calls
    arguments: dict[str, str] = {}
    forms = []
    for tag in calls:
        rule = arguments.setdefault(json.dumps(tag.schema), f"arguments_{len(arguments)}")
        forms.append(f"{_literal(tag.begin, marks)} {rule} {_literal(tag.end, marks)}")
    rules.append(f"call: {' | '.join(forms)}")
    rules += [f"{rule}: %json {schema}" for schema, rule in arguments.items()]
    return _HEADER + "\n".join([*rules, *form]) + "\n"


def json_rules(schema: Mapping[str, Any]) -> list[str]:
    return [f"form: %json {json.dumps(schema)}"]


def choice_rules(choice: Sequence[str]) -> list[str]:
    return ["form: FORM", f"FORM: {' | '.join(map(json.dumps, choice))}"]


def regex_rules(regex: str, calls: Sequence[Tag]) -> list[str]:
    """The texts of the regular expression that don't begin as a call."""
    begins = "|".join(_escaped(tag.begin) for tag in calls)
    return ["form: FORM", f"FORM: /(?:{_in_slashes(regex)})/ & ~/(?:{begins}){_ANYTHING}/"]


def _literal(text: str, marks: Marks) -> str:
    return " ".join(f"<[{marks[piece]}]>" if piece in marks else json.dumps(piece) for piece in _split(text, marks))


def _split(text: str, marks: Marks) -> list[str]:
    """The marks in the text, and the pieces between them."""
    found = sorted((mark for mark in marks if mark in text), key=len, reverse=True)
    if not found:
        return [text] if text else []
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, found))})", text) if piece]


def _escaped(text: str) -> str:
    """The text as a regular expression between slashes."""
    return "".join(char if char.isalnum() else rf"\x{{{ord(char):x}}}" for char in text)


def _in_slashes(regex: str) -> str:
    """A regular expression as it stands between slashes in Lark: no bare slash, no bare line break."""
    return re.sub(
        r"\\.|/|\n",
        lambda found: {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0]),
        regex,
        flags=re.DOTALL,
    )

"""The form of a request's output: JSON of a schema, a regular expression, a choice or a grammar.

Owns the limits that can be checked without compiling. `preft.engine.grammar` compiles.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

MAX_TEXT = 65_536  # characters of one form
MAX_DEPTH = 64  # nested objects and lists in a schema
MAX_ITEMS = 10_000  # sum of all minItems and maxItems: the compiler writes each item out

Text = Annotated[str, Field(max_length=MAX_TEXT)]
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*|#.*')
_BRACKETED = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_DIRECTIVE = re.compile(r"%(?!ignore\b|import\b|llguidance\b)\w*")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """vLLM's parameter of this name. Exactly one of `KINDS` is given; the constructor raises ValueError otherwise.

    `json` is a JSON Schema and `structural_tag` an object, both as JSON text. `grammar` is Lark or GBNF. The other
    fields are options of `json`, `json_object` and `structural_tag`.
    """

    json: Text | None = None
    regex: Text | None = None
    choice: tuple[str, ...] = ()
    grammar: Text | None = None
    json_object: bool = False
    structural_tag: Text | None = None
    whitespace_pattern: Text | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, (), False)]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        for name in KINDS:
            if isinstance(text := getattr(self, name), str) and len(text) > MAX_TEXT:
                raise ValueError(f"{name} has {len(text)} characters, the limit is {MAX_TEXT}")
        if sum(map(len, self.choice)) > MAX_TEXT:
            raise ValueError(f"choice has more than {MAX_TEXT} characters")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ValueError("has both whitespace_pattern and disable_any_whitespace")
        if self.json is not None:
            _check_json(self.json, "json", (dict, bool))
        if self.structural_tag is not None:
            _check_json(self.structural_tag, "structural_tag", (dict,))
        if self.grammar is not None:
            _check_grammar(self.grammar)


def _check_json(text: str, name: str, kinds: tuple[type, ...]) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, kinds):
        raise ValueError(f"{name} must be an object")
    level: list[Any] = [value]
    items = 0.0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                counts = (node.get("minItems"), node.get("maxItems"))
                items += sum(count for count in counts if isinstance(count, int | float))
            below += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        level = below
    if level:
        raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep")
    if items > MAX_ITEMS:
        raise ValueError(f"{name} has minItems and maxItems of together {items:.0f}, the limit is {MAX_ITEMS}")


def _check_grammar(text: str) -> None:
    """Refuses operators whose compilation can take minutes, and schemas inside a grammar, which `_check_json` skips."""
    if not text.strip():
        raise ValueError("grammar is empty")
    bare = _QUOTED.sub("", text)
    if "::=" in bare:
        bare = _BRACKETED.sub("", bare)
    for found in (re.search("[&~]", bare), _DIRECTIVE.search(bare)):
        if found:
            raise ValueError(f"grammar has {found[0]!r}, which isn't supported")

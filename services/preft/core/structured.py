"""The form of a request's output: JSON of a schema, a regular expression, a choice or a grammar.

Owns the limits that can be checked without compiling. `preft.engine.grammar` compiles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

MAX_TEXT = 65_536  # characters of one form
MAX_DEPTH = 64  # nested objects and lists in a schema

Text = Annotated[str, Field(max_length=MAX_TEXT)]
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """vLLM's parameter of this name. Exactly one of `KINDS` is given; the constructor raises ValueError otherwise.

    `json` is a JSON Schema and `structural_tag` an object, both as JSON text. `grammar` is Lark or GBNF. The other
    fields are options of `json`, `json_object` and `structural_tag`. Only the output behind the first token
    `begins_after` has the form, and no token ends the output before it; None: all of the output has the form.
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
    begins_after: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None

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
        if self.grammar is not None and not self.grammar.strip():
            raise ValueError("grammar is empty")


def _check_json(text: str, name: str, kinds: tuple[type, ...]) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, kinds):
        raise ValueError(f"{name} must be an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep")

"""The form of an output that is either tool calls or a text of a wanted form, and the forms for which there is one.

Owns the rules that keep the two apart: the beginning of the output alone says which it is. `text.tagged_calls` reads
the output, `preft.engine.grammar` compiles the form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.gateway.bodies.tool_choice import moved
from preft.gateway.text.parsing import CallTag
from preft.gateway.text.tagged_calls import begin_pattern, is_json

_ADVICE = "Use tool_choice='none' or 'required'"


def calls_or_form(tags: Sequence[CallTag], form: StructuredOutputs, param: str, *, parallel: bool) -> StructuredOutputs:
    """The output's form. `param` gave `form`. Raises InvalidRequest if an output couldn't be told to be either."""
    if not tags or any(tag.begin[:1] not in ("{", "<") for tag in tags):
        raise InvalidRequest(
            f"{param} and tool_choice='auto' can't be used together with this server's tool_call_parser: it isn't known"
            f" in which exact form the model writes calls. {_ADVICE}.",
            param,
        )
    if (problem := _problem(tags, form)) is not None:
        raise InvalidRequest(f"{param} can't be used together with tool_choice='auto': {problem}. {_ADVICE}.", param)
    fields = {name: value for name, value in asdict(form).items() if value not in (None, False, ())}
    wanted = {"calls": [_call(tag) for tag in tags], "several": parallel, "form": fields}
    try:
        return StructuredOutputs(structural_tag=json.dumps(wanted), disable_any_whitespace=form.disable_any_whitespace)
    except ValueError as error:
        raise InvalidRequest(f"The tools' parameters can't be served: {error}.", "tools") from None


def _call(tag: CallTag) -> dict[str, Any]:
    if not is_json(tag):
        return {"begin": tag.begin, "schema": tag.schema, "end": tag.end}
    # The grammar must read a call and a text that begins like it by the same rules: as one object.
    call = json.loads(tag.begin + "null" + tag.end)
    fields = {
        key: moved(tag.schema, f"#/properties/{key}") if value is None else {"const": value}
        for key, value in call.items()
    }
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    return {"begin": "", "schema": schema, "end": ""}


def _problem(tags: Sequence[CallTag], form: StructuredOutputs) -> str | None:
    """Why outputs of the form can't be told from calls, in a clause."""
    if form.grammar is not None or form.structural_tag is not None:
        return "a grammar or structural tag may allow texts that begin like a call"
    if not any(map(is_json, tags)):
        begins = begin_pattern(tags)
        return "a choice begins like a call" if any(map(begins.match, form.choice)) else None
    if form.regex is not None or any(text.lstrip().startswith("{") for text in form.choice):
        return "this model's calls are JSON objects, and the form may allow texts that begin so"
    if form.whitespace_pattern is not None:
        return "this model's calls are JSON objects, and whitespace_pattern would be the calls' pattern too"
    schema = {} if form.json is None else json.loads(form.json)
    names = {key for tag in tags for key in json.loads(tag.begin + "null" + tag.end)}
    if form.choice or _differs(schema, names, closed=form.disable_additional_properties):
        return None
    return (
        "this model's calls are JSON objects, so the form must be a JSON Schema of another type, or of objects with"
        f" 'properties', without {' or '.join(map(repr, sorted(names)))} and with additionalProperties: false"
    )


def _differs(schema: Any, keys: set[str], *, closed: bool) -> bool:
    """Whether no value of the schema is an object that has all of the `keys`."""
    if not isinstance(schema, Mapping):
        return False
    if isinstance(schema.get("type"), str) and schema["type"] != "object":
        return True
    properties = schema.get("properties")
    is_closed = closed or schema.get("additionalProperties") is False
    return (
        schema.get("type") == "object"
        and isinstance(properties, Mapping)
        and is_closed
        and not schema.keys() & {"patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
        and not keys <= properties.keys()
    )

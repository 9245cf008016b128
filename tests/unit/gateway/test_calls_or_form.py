"""The forms that may stand beside tool calls, and why others may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.gateway.calls_or_form import calls_or_form
from preft.gateway.text.parsing import CallTag

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"type": "string"}}}
MARKED = (CallTag("look", '<tool_call>{"name": "look", "arguments": ', CITY, "}</tool_call>"),)
PLAIN = (CallTag("look", '{"name": "look", "parameters": ', CITY, "}"),)


def schema(closed: bool = True, **fields: Any) -> str:
    return json.dumps({"type": "object", "properties": fields, **({"additionalProperties": False} if closed else {})})


@pytest.mark.parametrize(
    ("tags", "form"),
    [
        (MARKED, {"json": "true"}),
        (MARKED, {"json_object": True, "whitespace_pattern": " ?"}),
        (MARKED, {"regex": ".*"}),
        (MARKED, {"choice": ("yes", "<tool_call>")}),
        (PLAIN, {"choice": ("yes", "no")}),
        (PLAIN, {"json": schema(name={}, age={})}),
        (PLAIN, {"json": schema(False, name={}, age={}), "disable_additional_properties": True}),
        (PLAIN, {"json": '{"type": "array"}'}),
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_forms_that_differ_from_calls(tags, form, parallel):
    wanted = calls_or_form(tags, StructuredOutputs(**form), "response_format", parallel=parallel)
    assert wanted.structural_tag is not None
    given = json.loads(wanted.structural_tag)
    assert given["form"] == {name: list(value) if name == "choice" else value for name, value in form.items()}
    assert given["several"] is parallel
    [call] = given["calls"]
    if tags is MARKED:
        assert call == {"begin": MARKED[0].begin, "schema": CITY, "end": "}</tool_call>"}
        return
    assert (call["begin"], call["end"], call["schema"]["required"]) == ("", "", ["name", "parameters"])
    properties = call["schema"]["properties"]
    assert properties["name"] == {"const": "look"}
    assert properties["parameters"]["properties"]["city"]["$ref"] == "#/properties/parameters/$defs/city"


@pytest.mark.parametrize(
    ("tags", "form", "says"),
    [
        ((), {"json_object": True}, "tool_call_parser"),
        ((CallTag("f", "[f(", {}, ")]"),), {"json_object": True}, "tool_call_parser"),
        (MARKED, {"grammar": 'start: "a"'}, "grammar"),
        (MARKED, {"structural_tag": "{}"}, "structural tag"),
        (MARKED, {"choice": ('<tool_call>{"name": "look", "arguments": {}}',)}, "choice"),
        (PLAIN, {"choice": ("{",)}, "JSON objects"),
        (PLAIN, {"regex": "a"}, "JSON objects"),
        (PLAIN, {"json_object": True}, "additionalProperties"),
        (PLAIN, {"json": "true"}, "additionalProperties"),
        (PLAIN, {"json": schema(False, age={})}, "additionalProperties"),
        (PLAIN, {"json": schema(name={}, parameters={})}, "'parameters'"),
        (PLAIN, {"json": '{"anyOf": [{"type": "object"}]}'}, "additionalProperties"),
        (PLAIN, {"json": schema(age={}), "whitespace_pattern": "-"}, "whitespace_pattern"),
    ],
)
def test_forms_that_could_be_taken_for_calls_are_refused(tags, form, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        calls_or_form(tags, StructuredOutputs(**form), "response_format", parallel=True)
    assert refused.value.param == "response_format"


def test_tools_that_are_too_large_name_the_tools():
    large = (CallTag("look", "<a>", {"enum": ["x" * 70_000]}, "</a>"),)
    with pytest.raises(InvalidRequest, match="tools") as refused:
        calls_or_form(large, StructuredOutputs(json_object=True), "response_format", parallel=True)
    assert refused.value.param == "tools"

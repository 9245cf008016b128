"""The choice of tools in a body, and the form that makes the model call one."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.messages import Tool
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.schemas import ChatBody
from preft.gateway.bodies.tool_choice import NamedTool, forced_form

TREE = {
    "type": "object",
    "properties": {"child": {"$ref": "#"}, "size": {"$ref": "#/$defs/size"}},
    "$defs": {"size": {"type": "integer"}},
    "additionalProperties": False,
}
COLOUR = {
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/size"}},
    "required": ["size"],
    "$defs": {"size": {"enum": ["S", "L"]}},
}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("tree", TREE), tool("colour", COLOUR), tool("now")]


def body(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def schema_of(choice: Any, *, parallel: bool = True) -> Any:
    form = forced_form([Tool.model_validate(each) for each in TOOLS], choice, parallel=parallel)
    assert form is not None
    assert form.json is not None
    return json.loads(form.json)


def fits(value: Any, schema: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_required_calls_keep_each_functions_own_definitions():
    schema = schema_of("required")
    good = [
        {"name": "tree", "parameters": {"child": {"child": {}, "size": 3}}},
        {"name": "colour", "parameters": {"size": "L"}},
        {"name": "now", "parameters": {}},
    ]
    assert fits(good, schema)
    for call in (
        {"name": "tree", "parameters": {"child": {"size": "L"}}},
        {"name": "colour", "parameters": {"size": 3}},
        {"name": "colour", "parameters": {}},
        {"name": "other", "parameters": {}},
        {"name": "now"},
        {"name": "now", "parameters": {}, "more": 1},
    ):
        assert not fits([call], schema), call
    assert not fits([], schema)
    assert fits(good[:2], schema_of("required"))
    assert not fits(good[:2], schema_of("required", parallel=False))


def test_a_named_call_is_the_functions_parameters():
    assert schema_of(NamedTool("colour")) == COLOUR
    assert schema_of(NamedTool("now")) == {"type": "object", "properties": {}}


def test_a_large_schema_is_refused_by_name():
    huge = [Tool.model_validate(tool("f", {"type": "object", "description": "x" * 70_000}))]
    with pytest.raises(InvalidRequest) as refused:
        forced_form(huge, "required", parallel=True)
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, "none"),
        ({"tool_choice": "auto"}, "none"),
        ({"tools": TOOLS}, "auto"),
        ({"tools": TOOLS, "tool_choice": None}, "auto"),
        ({"tools": TOOLS, "tool_choice": "none"}, "none"),
        ({"tools": TOOLS, "tool_choice": "required"}, "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}}, NamedTool("now")),
    ],
)
def test_the_wanted_choice(fields, choice):
    assert body(**fields).wanted_tool_choice == choice


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "now"}},
    ],
)
def test_a_forced_call_needs_its_tool(choice):
    with pytest.raises(InvalidRequest) as refused:
        body(tool_choice=choice, tools=[tool("other")] if isinstance(choice, dict) else None)
    assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    "choice",
    [
        "any",
        3,
        {},
        {"type": "function"},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": "now", "more": 1}},
        {"type": "function", "function": {"name": "now"}, "more": 1},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
    ],
)
def test_other_choices_are_refused(choice):
    with pytest.raises(InvalidRequest) as refused:
        body(tools=TOOLS, tool_choice=choice)
    assert refused.value.param == "tool_choice"

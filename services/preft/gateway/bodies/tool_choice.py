"""The choice of tools in a chat's body, and the form of the output that makes the model call a tool.

A required call is a JSON array of calls, `{"name": ..., "parameters": {...}}` each, as in vLLM. A call of a named tool
is the function's parameters alone. The JSON is compact: free whitespace is where weak models go on for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.gateway.bodies.messages import Tool

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_KINDS = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The model must call this function, once."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool
CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "minLength": 1}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}


def read_tool_choice(value: object) -> ToolChoice:
    """Raises ValueError with a clause that follows the field's name."""
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **inner}, **outer} if (
            name and not inner and not outer
        ):
            return NamedTool(name)
    raise ValueError(_KINDS)


def forced_form(tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> StructuredOutputs | None:
    """The form of an output that is a call, None if the choice forces no call. Raises InvalidRequest."""
    if choice in ("none", "auto"):
        return None
    schema: dict[str, Any]
    if isinstance(choice, NamedTool):
        schema = next(_parameters(tool) for tool in tools if tool.function.name == choice.name)
    else:
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": []}}
        for number, tool in enumerate(tools):
            place = f"#/items/anyOf/{number}/properties/parameters"
            call = {"name": {"const": tool.function.name}, "parameters": moved(_parameters(tool), place)}
            schema["items"]["anyOf"].append(
                {"type": "object", "properties": call, "required": [*call], "additionalProperties": False}
            )
        if not parallel:
            schema["maxItems"] = 1
    try:
        return StructuredOutputs(json=json.dumps(schema), disable_any_whitespace=True)
    except ValueError as error:
        raise InvalidRequest(f"The tools' parameters can't be served: {error}.", "tools") from None


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or _NO_PARAMETERS


def moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own root point to `place`."""
    if isinstance(schema, list):
        return [moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else moved(value, place)
        for key, value in schema.items()
    }
